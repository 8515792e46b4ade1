"""The schedules of the ragged convolution in plain Python: which tiles there are, and what each of them writes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

STEP = 16  # packed channels are written up to a multiple of this


class Work(NamedTuple):
    """A ragged convolution as its schedules see it, all lists at hand.

    Attributes:
        samples: Of the batch.
        shared: Samples of a group.
        pixels: Output pixels of a sample.
        out_channels: All counted.
        rows: Pixels of a tile.
        channels: Output channels of a tile.
        in_count: Listed inputs by list; None: all.
        out_count: Listed outputs by list; None: all.
        order: The sample at every place of the groups, ``samples`` at empty ones; None: as they are.
        lists: The list of every group; None: the one of its number.
        packed: Listed outputs are written side by side; else every output is written.
    """

    samples: int
    shared: int
    pixels: int
    out_channels: int
    rows: int
    channels: int
    in_count: Sequence[int] | None = None
    out_count: Sequence[int] | None = None
    order: Sequence[int] | None = None
    lists: Sequence[int] | None = None
    packed: bool = False

    @property
    def groups(self) -> int:
        """Of samples that share a list."""
        places = self.samples if self.order is None else len(self.order)
        return -(-places // self.shared)

    @property
    def row_tiles(self) -> int:
        """Tiles along the pixels of a group."""
        return -(-self.shared * self.pixels // self.rows)

    @property
    def channel_tiles(self) -> int:
        """Tiles along the outputs."""
        return -(-self.out_channels // self.channels)

    def list_of(self, group: int) -> int:
        """The number of a group's list."""
        return group if self.lists is None else self.lists[group]

    def sample(self, group: int, place: int) -> int:
        """Who is at a place of a group; ``samples``, or more, for nobody."""
        place += group * self.shared
        return place if self.order is None else self.order[place]

    def open_outputs(self, group: int) -> int:
        """How many outputs a group's list has."""
        return self.out_channels if self.out_count is None else self.out_count[self.list_of(group)]


def ordinary_grid(work: Work) -> list[int]:
    """Every tile that there can be, by its number: the launch without a list of tiles."""
    return list(range(work.groups * work.row_tiles * work.channel_tiles))


def schedule_reference(work: Work) -> list[int]:
    """The numbers of the tiles that have something to write, longest reductions first.

    Of groups whose reductions are equally long the first comes first; a group's own tiles keep the order of the grid.
    """
    tiles: list[int] = []
    groups = range(work.groups)
    if work.in_count is not None:
        groups = sorted(groups, key=lambda group: -work.in_count[work.list_of(group)])  # type: ignore[index, assignment]
    for group in groups:
        here = sum(work.sample(group, place) < work.samples for place in range(work.shared))
        outs = work.open_outputs(group) if work.packed else work.out_channels
        first = group * work.row_tiles
        tiles += [
            (first + row) * work.channel_tiles + column
            for row in range(-(-here * work.pixels // work.rows))
            for column in range(-(-outs // work.channels))
        ]
    return tiles


def share(tiles: Sequence[int], programs: int) -> list[list[int]]:
    """What each of so many programs computes of a list of tiles, in turn."""
    return [list(tiles[program::programs]) for program in range(programs)]


def parts(steps: int, splits: int) -> list[range]:
    """The steps of a reduction that each of its parts adds up."""
    length = -(-steps // splits)
    return [range(part * length, min((part + 1) * length, steps)) for part in range(splits)]


def written(work: Work, tile: int) -> Iterator[tuple[int, int, int]]:
    """The sample, pixel and position of every element that a tile writes.

    A position is a place among the packed channels, or in the list of all outputs, which is a permutation of them.
    """
    group, rest = divmod(tile, work.row_tiles * work.channel_tiles)
    row_tile, column = divmod(rest, work.channel_tiles)
    until = work.out_channels
    if work.packed:
        until = -(-work.open_outputs(group) // STEP) * STEP
    for row in range(row_tile * work.rows, min((row_tile + 1) * work.rows, work.shared * work.pixels)):
        sample = work.sample(group, row // work.pixels)
        if sample < work.samples:
            for position in range(column * work.channels, min((column + 1) * work.channels, until)):
                yield sample, row % work.pixels, position
