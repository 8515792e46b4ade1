"""The judge of what was compiled ahead of time; tests/ops/test_triton.py compiles."""

import re

import pytest

pytest.importorskip("triton")

from bench import aot
from gatedkernels.ops.ragged.configurations import GROUPED_ROWS, TILES, shared_memory

CASE = next(case for case in aot.cases() if case.rows >= GROUPED_ROWS)


@pytest.mark.parametrize("chip", TILES)
def test_every_operation_and_tile_is_a_case(chip: str):
    names = [case.name for case in aot.cases(chip)]
    assert len(set(names)) == len(names)
    for numbers, size in aot.SIZES.items():
        for kind, listed in (("out", True), ("in", False)):
            for tile in aot.shipped(size, listed, chip)[-1 if numbers == "fp16" else 0 :]:
                assert f"conv {kind} 3x3/1 {numbers} {tile.rows}x{tile.channels}x{tile.depth}" in names
        assert {f"dweight {listed} {numbers} 64x64" for listed in ("out", "in")} <= {n.rsplit("x", 1)[0] for n in names}


@pytest.mark.parametrize("chip", TILES)
def test_every_day_has_each_kernel_and_each_tile(chip: str):
    cases = list(aot.cases(chip))
    daily = [case for case in cases if case.daily]
    assert {case.kernel for case in daily} == {case.kernel for case in cases}

    def kinds(chosen: list[aot.Case]) -> set[str]:
        return {re.split(r" \dx\d/", case.name)[0] for case in chosen}

    assert kinds([case for case in daily if "bf16" in case.name]) == kinds([c for c in cases if "bf16" in c.name])
    if chip != "ada":
        tiles = {case.name for case in cases if re.match(r"conv (out|in) 3x3/1 fp32", case.name)}
        assert tiles <= {case.name for case in daily}
    assert len(daily) < 70


@pytest.mark.parametrize("arch", aot.MATRIX)
def test_what_is_as_meant_passes(arch: int):
    most = shared_memory(divmod(arch, 10))
    assert aot.judge(CASE, arch, most, 0, aot.MATRIX[arch][0]) == ""
    assert aot.judge(CASE._replace(rows=16), arch, 0, 0, "HMMA") == ""
    assert aot.judge(CASE._replace(rows=0), arch, 0, 0, "") == ""


@pytest.mark.parametrize(
    ("shared", "spilled", "matrix", "problem"),
    [
        (0, 8, "HGMMA", "spills 8 bytes"),
        (227 * 1024 + 1, 0, "HGMMA", "shared memory"),
        (0, 0, "HMMA", "HGMMA is meant"),
        (0, 0, "", "no matrix unit"),
    ],
)
def test_what_is_wrong_is_named(shared: int, spilled: int, matrix: str, problem: str):
    assert problem in aot.judge(CASE, 90, shared, spilled, matrix)


def test_what_a_large_chip_has_room_for_is_too_much_for_a_small_one():
    assert aot.judge(CASE, 80, 100 * 1024, 0, "HMMA") == ""
    assert "shared memory where 101376 are allowed" in aot.judge(CASE, 89, 100 * 1024, 0, "HMMA")


def test_no_case_is_no_success(capsys: pytest.CaptureFixture[str]):
    assert aot.main(["--only", "no such case"]) == 1
