"""The cases are data: complete, named, and small when asked."""

import pytest

from bench.cases import (
    BATCHES,
    BLOCKS,
    COLD,
    DENSITIES,
    FUNCTIONALS,
    GROUPS,
    LIMITS,
    NETWORKS,
    ON_REQUEST,
    SECONDS_BESIDE,
    SHAPES,
    Limit,
)


def test_the_promised_cases_are_there():
    assert SHAPES == ((64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7))
    assert DENSITIES == (0.1, 0.2, 0.3, 0.5, 0.75, 1.0) and BATCHES == (1, 16)
    assert len(BLOCKS) == 8 * 2 * 6 and {case.cache for case in BLOCKS} == {"warm"}
    assert {(case.size, case.stem, case.batch, case.kept) for case in NETWORKS} == {
        (*images, batch, kept)
        for images in ((32, "cifar"), (224, "imagenet"))
        for batch in (1, 16)
        for kept in (0.3, 1.0)
    }
    assert {case.cache for case in COLD} == {"cold"} and 0 < len(COLD) < len(BLOCKS) / 3
    assert {case.dtype for case in (*BLOCKS, *COLD, *NETWORKS)} == {"float32"}
    assert {case.dtype for group in ("block_bf16", "network_bf16") for case in GROUPS[group]} == {"bfloat16"}
    assert {case.operation for case in FUNCTIONALS} == {"gated_conv2d", "gated_block"}


def test_names_tell_cases_apart():
    for cases in GROUPS.values():
        assert len({str(case) for case in cases}) == len(cases)
    assert str(BLOCKS[0]) == "64-32-1-0.1-exact-float32-warm"
    assert str(NETWORKS[-1]) == "gated_resnet18-1-224-imagenet-16-1-float32"


def test_small_ones_are_small():
    for case in (*BLOCKS, *COLD, *FUNCTIONALS):
        small = case.small()
        assert small.channels <= 64 and small.size <= 6 and small.batch <= 3
        assert small.density == case.density
    for case in NETWORKS:
        small = case.small()
        assert small.width <= 0.125 and small.size <= 12 and small.batch <= 2
        assert (small.kept, small.stem) == (max(case.kept, 0.5), case.stem)


def test_limits_speak_of_groups_and_facts_that_exist():
    for limit in LIMITS:
        assert any(limit.means(limit.group, case.facts()) for case in GROUPS[limit.group]), limit
    assert not any(
        Limit("block", "speedup", 1.0, only=(("dtype", ("int3",)),)).means("block", c.facts()) for c in BLOCKS
    )


@pytest.mark.parametrize(
    ("measure", "least", "geomean", "allowed", "cells"),
    [
        ("efficiency", 1.10, True, 0, 80),
        ("efficiency", 0.95, False, 4, 80),
        ("efficiency", 0.85, False, 0, 80),
        ("efficiency", 0.70, False, 0, 16),
        ("speedup", 1 / 1.03, False, 0, 96),
    ],
)
def test_the_promised_limits_of_blocks(measure, least, geomean, allowed, cells):
    (limit,) = (limit for limit in LIMITS if (limit.group, limit.measure, limit.least) == ("block", measure, least))
    assert (limit.geomean, limit.allowed) == (geomean, allowed)
    assert sum(limit.means("block", case.facts()) for case in BLOCKS) == cells


@pytest.mark.parametrize(("kept", "least"), [(0.3, 2.7), (1.0, 0.97)])
def test_the_promised_limits_of_networks(kept, least):
    cases = [case for case in NETWORKS if case.kept == kept]
    (limit,) = (limit for limit in LIMITS if limit.group == "network" and limit.means("network", cases[0].facts()))
    assert limit == Limit("network", "speedup", least, only=limit.only)
    assert [case for case in NETWORKS if limit.means("network", case.facts())] == cases


def test_the_whole_suite_takes_ten_minutes_at_most():
    assert SECONDS_BESIDE.keys() == GROUPS.keys()
    usual = [group for group in GROUPS if group not in ON_REQUEST]
    assert sum(len(GROUPS[group]) * (SECONDS_BESIDE[group] + 1.0) for group in usual) <= 600
