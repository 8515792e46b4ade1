"""The shipped sizes of the gate's programs: safe choices, not yet measured on hardware."""

from typing import NamedTuple


class GateTile(NamedTuple):
    """What one program of the gate holds; sizes are powers of two.

    Attributes:
        samples: That it decides for, one after the other's weights.
        pixels: Of one step of the pooling.
        channels: Of the image, all.
        hidden: Units of one step of the layers.
        decisions: All.
        warps: Groups of 32 threads.
    """

    samples: int
    pixels: int
    channels: int
    hidden: int
    decisions: int
    warps: int = 8


# Numbers of one step: what 256 threads hold in 32 registers each.
STEP = 8192
# Channels and decisions at most: with more, a step is no longer a unit of the hidden layer.
MOST = 4096
# Samples share a program, and its fetch of the weights, where so many programs remain: about one for each
# multiprocessor of a large chip.
PROGRAMS = 128
MOST_SAMPLES = 4


def gate_tile(samples: int, pixels: int, channels: int, hidden: int, decisions: int) -> GateTile:
    """The sizes for a batch of ``samples`` images of so many pixels, or rows of partial sums."""
    together = min(_up(max(samples // PROGRAMS, 1)), MOST_SAMPLES)
    widest = max(_up(channels), _up(decisions))
    together = min(together, STEP // widest)
    return GateTile(
        together,
        min(max(STEP // (together * _up(channels)), 1), _up(pixels)),
        _up(channels),
        min(max(STEP // (together * widest), 1), _up(hidden)),
        _up(decisions),
    )


def shipped() -> dict[str, GateTile]:
    """Tiles of typical layers and the extremes, by name: what is compiled ahead of time."""
    layers = {
        "64": (256, 1024, 64, 16, 64),
        "512": (256, 16, 512, 128, 512),
        "512, many samples": (4096, 16, 512, 128, 512),
        "widest": (256, 49, MOST, 1024, MOST),
        "one image": (1, 3136, 64, 16, 64),
    }
    return {name: gate_tile(*sizes) for name, sizes in layers.items()}


def _up(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
