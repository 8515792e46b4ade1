"""Every case, as data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from bench.replay import recorded_blocks

Layout = Literal["contiguous", "channels-last"]
Operation = Literal["gated_conv2d", "gated_block"]

# Channels and image size: ResNet-18's stages, on 32×32 and on 224×224 images.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (1, 16)
DENSITIES = (0.2, 0.3, 0.5, 0.75, 1.0)

# A call may take 3 % longer than the best dense way to the same result.
NEVER_SLOWER = 1 / 1.03


class _Case:
    """What the cases share: their facts for the results file, and a name from them."""

    def facts(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)  # type: ignore[call-overload]

    def __str__(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.facts().values())


@dataclass(frozen=True)
class BlockCase(_Case):
    """An optimised basic block with a gate; ``density`` of its inner channels are open, drawn by ``masks``."""

    channels: int
    size: int
    batch: int
    density: float
    masks: str = "exact"

    def small(self) -> "BlockCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, channels=self.channels // 8, size=min(self.size, 6), batch=min(self.batch, 3))


@dataclass(frozen=True)
class NetworkCase(_Case):
    """A whole optimised network; ``kept`` of its FLOPs are executed, gates included; 1: every gate is open."""

    model: str
    width: float
    size: int
    batch: int
    kept: float

    def small(self) -> "NetworkCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, width=self.width / 8, size=12, batch=min(self.batch, 2))


@dataclass(frozen=True)
class FunctionalCase(_Case):
    """One functional call from weights as PyTorch has them."""

    operation: Operation
    channels: int
    size: int
    batch: int
    density: float
    layout: Layout

    def small(self) -> "FunctionalCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, channels=self.channels // 8, size=min(self.size, 6), batch=min(self.batch, 3))


@dataclass(frozen=True)
class LinearCase(_Case):
    """One of the two layers of a multilayer perceptron with four hidden units a channel, ``density`` of them open.

    The baseline has its weights as PyTorch has them, as the gated call does, or packed beforehand.
    """

    gated: Literal["outputs", "inputs"]
    channels: int
    tokens: int
    batch: int
    density: float
    baseline: Literal["eager", "prepacked"] = "eager"

    def small(self) -> "LinearCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, channels=self.channels // 8, tokens=min(self.tokens, 30), batch=min(self.batch, 3))


@dataclass(frozen=True)
class Limit:
    """What `bench.check` demands.

    Attributes:
        group: Group of cells.
        measure: "speedup" or "efficiency".
        least: The least value.
        geomean: Whether the geometric mean of the group is judged, not each cell.
        only: Facts of the cells that are judged, all cells if empty.
    """

    group: str
    measure: Literal["speedup", "efficiency"]
    least: float
    geomean: bool = False
    only: tuple[tuple[str, Any], ...] = ()


BLOCKS = tuple(BlockCase(*shape, batch, density) for shape, batch, density in product(SHAPES, BATCHES, DENSITIES))

NETWORKS = tuple(NetworkCase("gated_resnet18", 1.0, 32, batch, kept) for batch, kept in product(BATCHES, (0.3, 1.0)))

FUNCTIONALS = tuple(
    FunctionalCase(operation, *shape, batch, density, layout)
    for operation, shape, batch, density, layout in product(
        get_args(Operation), ((64, 32), (256, 8), (128, 28), (512, 7)), BATCHES, (0.2, 0.5, 1.0), get_args(Layout)
    )
)

# ViT-Tiny on 224×224 images in patches of 28 pixels, ViT-Small in patches of 16.
LINEARS = tuple(
    LinearCase(gated, *shape, batch, density, baseline)
    for gated, shape, batch, (density, baseline) in product(
        ("outputs", "inputs"),
        ((192, 65), (384, 197)),
        BATCHES,
        (*product((0.1, 0.3, 0.5, 0.75, 1.0), ("eager",)), (0.3, "prepacked")),
    )
)

LIMITS = (
    Limit("block", "efficiency", 0.90, geomean=True),
    Limit("block", "speedup", NEVER_SLOWER),
    Limit("network", "speedup", 2.2, only=(("kept", 0.3),)),
    Limit("network", "speedup", 0.97, only=(("kept", 1.0),)),
    Limit("functional", "speedup", NEVER_SLOWER),
    Limit("linear", "speedup", NEVER_SLOWER, only=(("baseline", "eager"),)),
)


def mask_cases(recordings: Sequence[Path]) -> tuple[BlockCase, ...]:
    """Blocks under masks that are not uniform: random ones, and those that trained networks were recorded with.

    Args:
        recordings: Files that ``gatedkernels masks`` wrote.
    """
    drawn = [BlockCase(*shape, 16, 0.3, masks) for shape in SHAPES[:4] for masks in ("independent", "correlated")]
    replayed = [
        BlockCase(block.channels, block.size, 16, block.density, f"{path.stem}:{block.gate}")
        for path in recordings
        for block in recorded_blocks(path)
    ]
    return (*drawn, *replayed)
