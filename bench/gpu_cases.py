"""Cases of the GPU benchmark, as data, and how masks are drawn for them."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from bench.cases import SHAPES, _Case

KEPT = (0.15, 0.3, 0.5, 1.0)
# How masks hang together. Independent: every channel of every sample by itself. Group: neighbouring 64 channels alike.
# Codebook: eight masks, and samples of one mask are neighbours.
MASKS = ("independent", "group64", "codebook8")
# Neighbouring samples that share the union of their lists.
SHARED = (1, 2, 4, 8)


@dataclass(frozen=True)
class GpuBlock(_Case):
    """A basic block of ``channels`` on ``size`` × ``size`` images, ``kept`` of the hidden channels open."""

    channels: int
    size: int
    batch: int
    kept: float
    masks: str
    dtype: str = "bfloat16"

    def small(self) -> "GpuBlock":
        """The same in seconds in Triton's interpreter, which knows no bfloat16."""
        return replace(self, channels=16, size=3, batch=2, dtype="float32")

    @property
    def multiply_adds(self) -> int:
        """Of the dense block."""
        return 2 * 9 * self.channels**2 * self.size**2 * self.batch


@dataclass(frozen=True)
class GpuConv(_Case):
    """A dense 3×3 convolution of ``channels`` on ``size`` × ``size`` images: what cuDNN makes of a block's halves."""

    channels: int
    size: int
    batch: int
    dtype: str = "bfloat16"

    def small(self) -> "GpuConv":
        """The same in milliseconds."""
        return replace(self, channels=16, size=3, batch=2, dtype="float32")

    @property
    def multiply_adds(self) -> int:
        """Of one pass, forward or either gradient."""
        return 9 * self.channels**2 * self.size**2 * self.batch


@dataclass(frozen=True)
class GpuNetwork(_Case):
    """A folded ResNet-18 or ResNet-50 with given masks; its gates are not computed."""

    size: int
    stem: str
    batch: int
    kept: float
    width: float = 1.0
    dtype: str = "bfloat16"
    depth: int = 18

    def small(self) -> "GpuNetwork":
        """The same in seconds."""
        return replace(self, size=16, width=0.125, batch=1, dtype="float32")


BLOCKS = tuple(
    GpuBlock(*shape, batch, kept, masks)
    for shape, batch, kept, masks in product(SHAPES, (256,), KEPT, MASKS)
    # Everything open is the same under all models; 64 channels are one group, on or off.
    if (kept < 1 or masks == "independent") and (shape[0] > 64 or masks != "group64")
)
SMALL_BATCHES = tuple(
    GpuBlock(*shape, batch, kept, "independent") for shape, batch, kept in product(SHAPES, (1, 16, 64), (0.3, 1.0))
)
# Ways through the tiles, as (splits of the reduction, programs of a multiprocessor that share a list of tiles).
SCHEDULES = {
    "ordinary grid": (1, 0),
    **{f"{parts} splits": (parts, 0) for parts in (2, 4, 8)},
    **{f"list of tiles, {programs} programs": (1, programs) for programs in (1, 2, 3)},
}
SCHEDULED = tuple(
    GpuBlock(*shape, batch, 0.3, masks)
    for shape, (batch, masks) in product(
        SHAPES, ((1, "independent"), (16, "independent"), (256, "independent"), (256, "codebook8"))
    )
)
TUNED = tuple(GpuBlock(*shape, batch, 0.3, "independent") for shape, batch in product(SHAPES, (16, 256)))
CONVOLUTIONS = tuple(GpuConv(*shape, 256) for shape in SHAPES)
NETWORKS = tuple(
    GpuNetwork(size, stem, batch, kept, depth=depth)
    for depth, (size, stem), batch, kept in product(
        (18, 50), ((32, "cifar"), (224, "imagenet")), (1, 16, 64, 256), (0.3, 0.5, 1.0)
    )
)


def draw_masks(
    masks: str, samples: int, channels: int, kept: float, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """Bool (samples, channels), exactly ``round(kept · decisions)`` of each row's decisions open, at least one.

    Args:
        masks: One of ``MASKS``.
        samples: Rows.
        channels: Columns.
        kept: Part that is open.
        generator: On the CPU: the same masks on every device.
        device: Where the result lies.
    """
    group = min(64, channels) if masks == "group64" else 1
    rows = min(8, samples) if masks == "codebook8" else samples
    decisions = channels // group
    scores = torch.rand(rows, decisions, generator=generator)
    opened = scores.argsort(1).argsort(1) < max(1, round(kept * decisions))
    if masks == "codebook8":
        opened = opened[torch.randint(rows, (samples,), generator=generator).sort().values]
    return opened.repeat_interleave(group, 1).to(device)
