"""The shipped configurations of the ragged convolution: safe choices by reasoning, not yet measured on hardware.

``make aot`` checks that each fits into the shared memory of its chips and spills no register; ``gatedkernels.tune``
measures others. This file knows neither PyTorch nor Triton.
"""

from collections.abc import Iterable
from typing import NamedTuple

KIB = 1 << 10
# Shared memory that a block may have, by compute capability; a chip that is not listed gets the least.
SHARED = {(8, 0): 163 * KIB, (8, 7): 163 * KIB, (9, 0): 227 * KIB, (10, 0): 227 * KIB, (10, 3): 227 * KIB}
LEAST_SHARED = 99 * KIB
GROUPED_ROWS = 64  # pixels from which warp groups multiply


class Tile(NamedTuple):
    """What one program computes, and with what.

    Attributes:
        rows: Pixels.
        channels: Output channels.
        depth: Input channels in one step of the reduction.
        warps: Groups of 32 threads.
        stages: Steps whose loads are under way at the same time, and the one that is computed.
    """

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int

    def pipeline(self, listed_inputs: bool) -> int:
        """The compiler's number of stages: where weights are found through a list, its loads have their own."""
        return 2 * self.stages - 1 if listed_inputs else self.stages

    def shared(self, size: int, capability: tuple[int, int]) -> int:
        """Bytes of shared memory on a chip, about: images and weights of the stages in it, and lists.

        Warp groups, from Hopper on, multiply from there; others from registers, where one stage lies.
        """
        grouped = capability >= (9, 0) and self.rows >= GROUPED_ROWS
        stages = self.stages if grouped else self.stages - 1
        return stages * (self.rows + self.channels) * self.depth * size + KIB


class Configuration(NamedTuple):
    """A tile, and how a launch goes through all of them.

    Attributes:
        tile: What one program computes.
        splits: Parts of the reduction, whose sums are added up always in the same order.
        programs: So many programs on a multiprocessor share a list of the tiles that have something to compute, none of
            them split; 0: a program for each tile that there can be.
    """

    tile: Tile
    splits: int = 1
    programs: int = 0


class Shape(NamedTuple):
    """What a configuration is chosen by: facts that are known without looking at a value.

    Attributes:
        listed: Which sides have lists: "none", "out", "in" or "both".
        packed: Listed outputs are written side by side, and nothing else is.
        numbers: "bfloat16", "float16", "float32", or "tf32" for float32 that may be rounded to that.
        taps: Of the window.
        stride: Product of the strides.
        spread: Likewise of how far the pixels of a gradient lie apart.
        in_channels: Of the convolution, all counted.
        out_channels: Likewise.
        pixels: Output pixels of all samples that share a list.
        groups: Of samples that share a list.
    """

    listed: str
    packed: bool
    numbers: str
    taps: int
    stride: int
    spread: int
    in_channels: int
    out_channels: int
    pixels: int
    groups: int

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 4 if self.numbers in ("float32", "tf32") else 2

    @property
    def listed_inputs(self) -> bool:
        """Whether some of the inputs are not read."""
        return self.listed in ("in", "both")

    @property
    def listed_outputs(self) -> bool:
        """Whether some of the outputs are not computed."""
        return self.listed in ("out", "both")

    def tiles(self, tile: Tile) -> int:
        """How many tiles there can be."""
        return self.groups * -(-self.pixels // tile.rows) * -(-self.out_channels // tile.channels)

    def steps(self, tile: Tile) -> int:
        """How many steps a whole reduction takes."""
        return self.taps * -(-self.in_channels // tile.depth)

    def key(self) -> str:
        """What a measurement is kept under: batches up to the next power of two share one."""
        groups = 1 << max(self.groups - 1, 0).bit_length()
        how = f"{self.listed} packed" if self.packed else self.listed
        return (
            f"{self.numbers} {how}, {self.taps} taps / {self.stride} x {self.spread}, "
            f"{self.in_channels} > {self.out_channels}, {self.pixels} pixels x {groups}"
        )


Table = dict[int, tuple[tuple[float, Tile], ...]]


def _table(few: int, some: int, many: int, many_of_four_bytes: int) -> Table:
    """By bytes of a number and pixels of a list: the first row whose bound is not exceeded.

    Args:
        few: Stages for lists of few pixels, which are bound by fetching weights, whatever the tile.
        some: For more pixels than 32.
        many: For more than 128.
        many_of_four_bytes: Likewise, of float32, which takes more registers.
    """

    def rows(depth: int, many: int) -> tuple[tuple[float, Tile], ...]:
        return (
            (16.0, Tile(16, 64, depth, 4, few)),
            (32.0, Tile(32, 64, depth, 4, few)),
            (128.0, Tile(64, 64, depth, 4, some)),
            (float("inf"), Tile(128, 64, depth, 8, many)),
        )

    return {2: rows(64, many), 4: rows(32, many_of_four_bytes)}


# Registers let one block of 8 warps with 128 rows onto a multiprocessor of Ampere and Ada, two on Hopper: its stages
# are what shared memory has room for beside that. Small tiles are to be several on a multiprocessor. With
# four stages of float32 on Hopper, Triton 3.6 aims at two blocks' registers and spills on Blackwell.
TILES: dict[str, Table] = {
    "ampere": _table(5, 4, 4, 4),
    "ada": _table(4, 4, 3, 3),
    "hopper": _table(6, 4, 4, 3),
}
# A list that can hold no more than 64 channels rarely fills a tile of 64: half of one wastes less.
NARROW = 64
# Where all outputs are computed and pixels are many, images are fetched half as often for twice as many outputs.
WIDE = 128
# A launch of fewer tiles than half of this is split, so that there is a program for each multiprocessor of a large
# chip; a part has so many steps at least. Shapes alone decide, and so the order of all sums.
SPLIT_PROGRAMS = 256
SPLIT_MOST = 8
SPLIT_STEPS = 8
# How many tiles there may be whose parts are counted where the list of channels brings the counters along.
ARRIVED = 512
# A list of tiles: from so many tiles, and so many of them along the channels of a list, most of which are not there
# where few channels are open. One that costs a launch of its own was not foreseen to gain more than that.
SCHEDULED_TILES = 1024
SCHEDULED_CHANNELS = 4
# Warps that a multiprocessor's registers have room for, at 128 a thread.
SCHEDULED_WARPS = 16


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have."""
    return SHARED.get(capability, LEAST_SHARED)


def family(capability: tuple[int, int]) -> str:
    """Whose tiles serve a chip: "ampere", "ada" or "hopper", by what a block has room for."""
    return {LEAST_SHARED: "ada", 163 * KIB: "ampere"}.get(shared_memory(capability), "hopper")


def tile(
    pixels: int, in_channels: int, out_channels: int, size: int, listed_outputs: bool, chip: str = "hopper"
) -> Tile:
    """The tile for lists of so many pixels.

    Args:
        pixels: Output pixels of all samples that share a list.
        in_channels: Of the convolution, all counted.
        out_channels: Likewise.
        size: Bytes of a number, 2 or 4.
        listed_outputs: Whether some of the outputs are not computed.
        chip: Whose tiles.
    """
    chosen = next(each for most, each in TILES[chip][size] if pixels <= most)
    if out_channels <= NARROW:
        chosen = chosen._replace(channels=chosen.channels // 2)
    elif out_channels >= WIDE and chosen.rows == WIDE and not listed_outputs:
        chosen = chosen._replace(channels=WIDE)
    if in_channels <= NARROW:
        chosen = chosen._replace(depth=chosen.depth // 2)
    return chosen


def shipped(size: int, listed_outputs: bool, chip: str = "hopper") -> list[Tile]:
    """Every tile that ``tile`` can return for numbers of so many bytes, the largest last."""
    pixels = [int(min(most, 1 << 20)) for most, _ in TILES[chip][size]]
    sizes = (NARROW, NARROW + 1, WIDE)
    return sorted({tile(each, i, o, size, listed_outputs, chip) for each in pixels for i in sizes for o in sizes})


def splits(shape: Shape, chosen: Tile) -> int:
    """Into how many parts the reduction is split: a power of two, 1 where there are tiles enough."""
    most = min(SPLIT_MOST, SPLIT_PROGRAMS // max(shape.tiles(chosen), 1), shape.steps(chosen) // SPLIT_STEPS)
    return 1 << max(most, 1).bit_length() - 1


def configure(shape: Shape, capability: tuple[int, int], tiles_free: bool = False) -> Configuration:
    """The shipped configuration of a convolution on a chip.

    Args:
        shape: What there is to compute.
        capability: Of the chip.
        tiles_free: A list of tiles costs no launch.
    """
    sizes = shape.pixels, shape.in_channels, shape.out_channels, shape.size, shape.listed_outputs
    chosen = tile(*sizes, family(capability))
    scheduled = (
        tiles_free
        and shape.packed
        and shape.tiles(chosen) >= SCHEDULED_TILES
        and shape.out_channels >= SCHEDULED_CHANNELS * chosen.channels
    )
    room = shared_memory(capability) // chosen.shared(shape.size, capability)
    programs = max(1, min(SCHEDULED_WARPS // chosen.warps, room)) if scheduled else 0
    return Configuration(chosen, splits(shape, chosen), programs)


def fits(shape: Shape, chosen: Tile, capability: tuple[int, int]) -> bool:
    """Whether a tile is worth compiling: room in shared memory, and in the registers of its threads."""
    threads = 32 * chosen.warps
    sums, images = chosen.rows * chosen.channels / threads, chosen.rows * chosen.depth / threads
    return chosen.shared(shape.size, capability) <= shared_memory(capability) and sums <= 64 and images <= 32


def tiles(chosen: Configuration, shape: Shape, capability: tuple[int, int]) -> list[Configuration]:
    """The same with other tiles, none much larger than what there is, nor much smaller."""
    found = []
    for rows in (16, 32, 64, 128):
        for channels in (32, 64, 128):
            for depth in (64 // shape.size, 128 // shape.size):
                warps = 8 if rows * channels >= 128 * 64 else 4
                found.append(Tile(rows, channels, depth, warps, chosen.tile.stages))
    useful = (
        each
        for each in found
        if min(shape.pixels, 256) <= 8 * each.rows <= max(128, 16 * shape.pixels)
        and each.channels <= max(32, 2 * shape.out_channels)
        and each.depth <= max(16, 2 * shape.in_channels)
    )
    return _fitting(useful, chosen, shape, capability)


def pipelines(chosen: Configuration, shape: Shape, capability: tuple[int, int]) -> list[Configuration]:
    """The same with other numbers of warps and stages."""
    others = (chosen.tile._replace(warps=warps, stages=stages) for warps in (4, 8) for stages in (2, 3, 4, 6))
    return _fitting(others, chosen, shape, capability)


def schedules(chosen: Configuration, shape: Shape, capability: tuple[int, int]) -> list[Configuration]:
    """Other ways through the tiles: split where they are few, from a list where lists decide how many there are."""
    others = [Configuration(chosen.tile)]
    for parts in (2, 4, 8):
        if shape.tiles(chosen.tile) * parts <= 2 * ARRIVED and shape.steps(chosen.tile) >= 2 * parts:
            others.append(Configuration(chosen.tile, parts))
    if shape.listed != "none":
        others += [Configuration(chosen.tile, 1, programs) for programs in (1, 2, 3, 4)]
    return [each for each in others if each != chosen]


# What ``gatedkernels.tune`` measures, in turn, each with the fastest of the one before: schedules suit a tile.
ROUNDS = (tiles, pipelines, schedules)


def _fitting(
    others: Iterable[Tile], chosen: Configuration, shape: Shape, capability: tuple[int, int]
) -> list[Configuration]:
    fitting = (each for each in others if each != chosen.tile and fits(shape, each, capability))
    return [chosen._replace(tile=each) for each in fitting]


# Samples of one list whose images are small share a tile of so many pixels, and with it what that fetches.
TOGETHER, MOST_TOGETHER = 128, 8


def together(pixels: int) -> int:
    """How many samples of one list, with images of so many pixels, fill a tile."""
    return min(-(-TOGETHER // max(pixels, 1)), MOST_TOGETHER)


class GradientTile(NamedTuple):
    """What one program of the weights' gradient computes: outputs by inputs, ``rows`` pixels a step."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


# By bytes of a number.
GRADIENT_TILES = {2: GradientTile(64, 64, 64, 4, 3), 4: GradientTile(64, 64, 32, 4, 3)}
# Pixels are split over programs until there are so many: two for each multiprocessor of a large chip. It depends on
# shapes alone, and so does the order of all sums.
GRADIENT_PROGRAMS = 256
