"""Every output element of the ragged convolution is written exactly once, whatever the plan: emulated."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedkernels.ops.ragged.reference import (
    STEP,
    Work,
    ordinary_grid,
    parts,
    schedule_reference,
    share,
    written,
)


@st.composite
def works(draw: st.DrawFn) -> Work:
    """Plans of any kind: widths and lists, neighbours, groups in another order, groups of codes, empty ones."""
    samples, shared = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    channels = draw(st.integers(1, 70))
    groups = -(-samples // shared)
    order = lists = None
    if draw(st.booleans()):
        groups += draw(st.integers(0, 3))
        # Places are filled from the first one of a group on, as gatedkernels.ops.ragged.groups fills them.
        filled, left = [], samples
        for group in range(groups):
            least = max(0, left - shared * (groups - group - 1))
            filled.append(draw(st.integers(least, min(shared, left))))
            left -= filled[-1]
        who = iter(draw(st.permutations(range(samples))))
        order = [next(who) if place < number else samples for number in filled for place in range(shared)]
    count = groups
    if draw(st.booleans()):
        count = draw(st.integers(1, 3))
        lists = draw(st.lists(st.integers(0, count - 1), min_size=groups, max_size=groups))
    counts = st.none() | st.lists(st.integers(0, channels), min_size=count, max_size=count)
    rows, columns = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32, 64]))
    return Work(
        samples, shared, draw(st.integers(1, 40)), channels, rows, columns,
        draw(counts), draw(counts), order, lists, draw(st.booleans()),
    )  # fmt: skip


def wanted(work: Work) -> Counter:
    """Each element that has to be written, once: packed up to the next step, else all outputs."""
    found: Counter = Counter()
    for group in range(work.groups):
        until = -(-work.open_outputs(group) // STEP) * STEP if work.packed else work.out_channels
        for sample in (work.sample(group, place) for place in range(work.shared)):
            if sample < work.samples:
                found.update((sample, pixel, k) for pixel in range(work.pixels) for k in range(until))
    return found


def writes(work: Work, tiles: list[int]) -> Counter:
    return Counter(element for tile in tiles for element in written(work, tile))


@settings(max_examples=60, deadline=None)
@given(works(), st.integers(1, 9))
def test_every_element_is_written_exactly_once(work: Work, programs: int):
    assert writes(work, ordinary_grid(work)) == wanted(work)
    shares = share(schedule_reference(work), programs)
    assert writes(work, [tile for tiles in shares for tile in tiles]) == wanted(work)


@settings(max_examples=60, deadline=None)
@given(works())
def test_the_list_holds_what_has_something_to_write_and_nothing_else(work: Work):
    tiles = schedule_reference(work)
    assert sorted(tiles) == [tile for tile in ordinary_grid(work) if any(written(work, tile))]
    lengths = [0 if work.in_count is None else work.in_count[work.list_of(t // per_group(work))] for t in tiles]
    assert lengths == sorted(lengths, reverse=True)


def per_group(work: Work) -> int:
    return work.row_tiles * work.channel_tiles


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 2, 4, 8]))
def test_parts_of_a_reduction_are_disjoint_and_whole(steps: int, splits: int):
    assert [step for part in parts(steps, splits) for step in part] == list(range(steps))


@settings(max_examples=30, deadline=None)
@given(works())
def test_a_tile_too_many_or_too_few_is_noticed(work: Work):
    tiles = schedule_reference(work)
    if tiles:
        assert writes(work, tiles[1:]) != wanted(work)
        assert writes(work, [*tiles, tiles[0]]) != wanted(work)


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_share_evenly(programs: int):
    sizes = {len(tiles) for tiles in share(range(40), programs)}
    assert max(sizes) - min(sizes) <= 1
