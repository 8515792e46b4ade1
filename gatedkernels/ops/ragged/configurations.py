"""The shipped tiles of the ragged convolution: safe choices, not yet measured on hardware.

Each fits into the 99 KiB of shared memory that a block has on the smallest chips meant (Ada), and ``make aot`` checks
that none of them spills registers.
"""

from typing import NamedTuple


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


# By bytes of a number and pixels of a list: the first row whose bound is not exceeded. Weights are fetched anew for
# each list, so that lists of few pixels are bound by that, whatever the tile.
TILES: dict[int, tuple[tuple[float, Tile], ...]] = {
    2: (
        (16, Tile(16, 64, 64, 4, 4)),
        (32, Tile(32, 64, 64, 4, 4)),
        (128, Tile(64, 64, 64, 4, 4)),
        (float("inf"), Tile(128, 64, 64, 8, 3)),
    ),
    4: (
        (16, Tile(16, 64, 32, 4, 4)),
        (32, Tile(32, 64, 32, 4, 4)),
        (128, Tile(64, 64, 32, 4, 4)),
        (float("inf"), Tile(128, 64, 32, 8, 3)),
    ),
}
# A list that can hold no more than 64 channels rarely fills a tile of 64: half of one wastes less.
NARROW = 64
# Where all outputs are computed and pixels are many, images are fetched half as often for twice as many outputs.
WIDE = 128


def tile(pixels: int, in_channels: int, out_channels: int, size: int, listed_outputs: bool) -> Tile:
    """The tile for lists of so many pixels.

    Args:
        pixels: Output pixels of all samples that share a list.
        in_channels: Of the convolution, all counted.
        out_channels: Likewise.
        size: Bytes of a number, 2 or 4.
        listed_outputs: Whether some of the outputs are not computed.
    """
    chosen = next(each for most, each in TILES[size] if pixels <= most)
    if out_channels <= NARROW:
        chosen = chosen._replace(channels=chosen.channels // 2)
    elif out_channels >= WIDE and chosen.rows == WIDE and not listed_outputs:
        chosen = chosen._replace(channels=WIDE)
    if in_channels <= NARROW:
        chosen = chosen._replace(depth=chosen.depth // 2)
    return chosen


def shipped(size: int, listed_outputs: bool) -> list[Tile]:
    """Every tile that ``tile`` can return for numbers of so many bytes, the largest last."""
    pixels = [int(min(most, 1 << 20)) for most, _ in TILES[size]]
    sizes = (NARROW, NARROW + 1, WIDE)
    return sorted({tile(each, ins, outs, size, listed_outputs) for each in pixels for ins in sizes for outs in sizes})


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
