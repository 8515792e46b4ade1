"""Every case, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from bench.replay import recorded_blocks, recordings

Layout = Literal["contiguous", "channels-last"]
Operation = Literal["gated_conv2d", "gated_block"]
Cache = Literal["warm", "cold"]

# Channels and image size: ResNet-18's stages, on 32×32 and on 224×224 images.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (1, 16)
DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# Images and what a ResNet begins with on them.
IMAGES = ((32, "cifar"), (224, "imagenet"))
# Of slimmable networks.
WIDTHS = (0.25, 0.5, 0.75, 1.0)

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
    """An optimised basic block with a gate; ``density`` of its inner channels are open, drawn by ``masks``.

    Its weights and images are in the caches before each timed call ("warm"), or in memory ("cold").
    """

    channels: int
    size: int
    batch: int
    density: float
    masks: str = "exact"
    dtype: str = "float32"
    cache: Cache = "warm"

    def small(self) -> "BlockCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, channels=self.channels // 8, size=min(self.size, 6), batch=min(self.batch, 3))


@dataclass(frozen=True)
class BottleneckCase(_Case):
    """An optimised bottleneck without a shortcut; ``density`` of the channels behind either of its gates are open."""

    planes: int
    size: int
    batch: int
    density: float

    def small(self) -> "BottleneckCase":
        """The same in milliseconds, to see that it works."""
        return replace(self, planes=self.planes // 8, size=min(self.size, 6), batch=min(self.batch, 3))


@dataclass(frozen=True)
class NetworkCase(_Case):
    """A whole optimised network; ``kept`` of its FLOPs are executed, gates included; 1: every gate is open."""

    model: str
    width: float
    size: int
    stem: str
    batch: int
    kept: float
    dtype: str = "float32"

    def small(self) -> "NetworkCase":
        """The same in milliseconds, to see that it works."""
        # Stems and gates, which nothing shuts, are a larger share of it.
        return replace(self, width=self.width / 8, size=12, batch=min(self.batch, 2), kept=max(self.kept, 0.5))


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
class PointwiseCase(_Case):
    """One functional 1x1 convolution on channels-last images, ``density`` of its outputs or of its inputs open."""

    gated: Literal["outputs", "inputs"]
    channels: int
    filters: int
    size: int
    batch: int
    density: float

    def small(self) -> "PointwiseCase":
        """The same in milliseconds, to see that it works."""
        few = {"channels": self.channels // 8, "filters": self.filters // 8}
        return replace(self, size=min(self.size, 6), batch=min(self.batch, 3), **few)


@dataclass(frozen=True)
class BackwardCase(_Case):
    """The backward of one functional call on channels-last images."""

    operation: Operation
    channels: int
    size: int
    batch: int
    density: float

    def small(self) -> "BackwardCase":
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
        geomean: Whether the geometric mean of the cells is judged, not each cell.
        allowed: So many of the cells may lie below.
        only: Facts of the cells that are judged, each with the values that are meant; all cells if empty.
    """

    group: str
    measure: Literal["speedup", "efficiency"]
    least: float
    geomean: bool = False
    allowed: int = 0
    only: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def means(self, group: str, facts: Mapping[str, Any]) -> bool:
        """Whether it speaks of a cell."""
        return group == self.group and all(facts.get(name) in values for name, values in self.only)

    def __str__(self) -> str:
        which = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in self.only)
        judged = "geomean " if self.geomean else ""
        allowed = f", but for {self.allowed} cells" if self.allowed else ""
        return f"{self.group} ({which or 'all'}): {judged}{self.measure} {self.least:.3f}{allowed}"


BLOCKS = tuple(BlockCase(*shape, batch, density) for shape, batch, density in product(SHAPES, BATCHES, DENSITIES))

# Early and late stages, few and all channels: where weights, and where images are what has to be fetched.
COLD = tuple(
    BlockCase(*shape, batch, density, cache="cold")
    for shape, batch, density in product((SHAPES[0], SHAPES[3], SHAPES[4], SHAPES[7]), BATCHES, (0.2, 0.5, 1.0))
)

NETWORKS = tuple(
    NetworkCase("gated_resnet18", 1.0, *images, batch, kept)
    for images, batch, kept in product(IMAGES, BATCHES, (0.3, 1.0))
)

# ResNet-50 and its blocks without shortcuts.
BOTTLENECKS = tuple(
    BottleneckCase(*shape, batch, density) for shape, batch, density in product(SHAPES, BATCHES, (0.2, 0.3, 0.5, 1.0))
)
NETWORKS_50 = tuple(replace(case, model="gated_resnet50") for case in NETWORKS)

# The same blocks and networks where weights and activations are bfloat16.
BLOCKS_BF16 = tuple(replace(case, dtype="bfloat16") for case in BLOCKS)
NETWORKS_BF16 = tuple(replace(case, dtype="bfloat16") for case in NETWORKS)

FUNCTIONALS = tuple(
    FunctionalCase(operation, *shape, batch, density, layout)
    for operation, shape, batch, density, layout in product(
        get_args(Operation), ((64, 32), (256, 8), (128, 28), (512, 7)), BATCHES, (0.2, 0.5, 1.0), get_args(Layout)
    )
)

# Those of bottlenecks and of inverted residuals.
POINTWISE = tuple(
    PointwiseCase(gated, *shape, density)
    for gated, shape, density in product(
        ("outputs", "inputs"),
        (
            *((64, 256, 56, 1), (256, 64, 28, 1), (512, 128, 28, 1), (256, 256, 14, 1), (1024, 256, 14, 1)),
            *((2048, 512, 7, 1), (64, 256, 56, 16), (256, 256, 14, 16), (512, 512, 7, 16)),
        ),
        (0.3, 0.5, 0.7, 1.0),
    )
)

BACKWARDS = (
    *(BackwardCase("gated_block", *shape, 16, 0.3) for shape in SHAPES),
    *(BackwardCase("gated_block", *shape, 1, 0.3) for shape in (SHAPES[0], SHAPES[3])),
    BackwardCase("gated_block", *SHAPES[0], 16, 1.0),
    *(BackwardCase("gated_conv2d", *shape, 16, 0.3) for shape in (SHAPES[0], SHAPES[2])),
)

# One image, whose gradients are soon computed and all the same written whole.
BACKWARDS_ONE = tuple(BackwardCase("gated_block", *shape, 1, density) for density, shape in product((0.3, 0.5), SHAPES))

_MOST = ("density", DENSITIES[1:])
_LEAST = ("density", DENSITIES[:1])
_BUDGET = ("kept", (0.3,))
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
    Limit("block", "efficiency", 1.10, geomean=True, only=(_MOST,)),
    Limit("block", "efficiency", 0.95, allowed=4, only=(_MOST,)),
    Limit("block", "efficiency", 0.85, only=(_MOST,)),
    Limit("block", "efficiency", 0.70, only=(_LEAST,)),
    Limit("block", "speedup", NEVER_SLOWER),
    Limit("network", "speedup", 2.7, only=(_BUDGET,)),
    Limit("network", "speedup", 0.97, only=(("kept", (1.0,)),)),
    Limit("block_bf16", "efficiency", 1.0, geomean=True, only=(_MOST,)),
    Limit("block_bf16", "efficiency", 0.80, only=(_MOST,)),
    Limit("block_bf16", "efficiency", 0.55, only=(_LEAST,)),
    Limit("network_bf16", "speedup", 2.2, only=(_BUDGET,)),
    Limit("functional", "speedup", NEVER_SLOWER),
    Limit("linear", "speedup", NEVER_SLOWER, only=(("baseline", "eager"),)),
    Limit(
        "backward",
        "efficiency",
        0.85,
        geomean=True,
        only=(("operation", ("gated_block",)), ("batch", (16,)), ("density", (0.3,))),
    ),
    Limit("backward", "speedup", NEVER_SLOWER),
)


def mask_cases(files: Sequence[Path]) -> tuple[BlockCase, ...]:
    """Blocks under masks that are not uniform: random ones, and those that trained networks were recorded with.

    Args:
        files: Files that ``gatedkernels masks`` wrote.
    """
    drawn = [BlockCase(*shape, 16, 0.3, masks) for shape in SHAPES[:4] for masks in ("independent", "correlated")]
    replayed = [
        BlockCase(block.channels, block.size, 16, block.density, f"{path.stem}:{block.gate}")
        for path in files
        for block in recorded_blocks(path)
    ]
    return (*drawn, *replayed)


# Every case, by the group of its cells; ``bench/test_<file>.py`` has a ``test_<group>`` for each.
AnyCase = BlockCase | BottleneckCase | NetworkCase | FunctionalCase | PointwiseCase | BackwardCase | LinearCase
GROUPS: dict[str, tuple[AnyCase, ...]] = {
    "block": BLOCKS,
    "masks": mask_cases(recordings()),
    "cold": COLD,
    "block_bf16": BLOCKS_BF16,
    "network": NETWORKS,
    "network_bf16": NETWORKS_BF16,
    "bottleneck": BOTTLENECKS,
    "network_50": NETWORKS_50,
    "functional": FUNCTIONALS,
    "pointwise": POINTWISE,
    "backward": BACKWARDS,
    "backward_one": BACKWARDS_ONE,
    "linear": LINEARS,
}

# Groups that are measured where they are asked for; the others take ten minutes.
ON_REQUEST = ("block_bf16", "network_bf16", "bottleneck", "network_50", "pointwise", "backward_one")

# What a case takes beside the seconds it is timed for: building, checking, choosing the baseline; two Zen 4 cores.
SECONDS_BESIDE = {
    "block": 0.4,
    "masks": 0.4,
    "cold": 0.5,
    "block_bf16": 0.4,
    "network": 20.0,
    "network_bf16": 20.0,
    "bottleneck": 0.5,
    "network_50": 40.0,
    "functional": 0.6,
    "pointwise": 0.4,
    "backward": 0.8,
    "backward_one": 0.8,
    "linear": 0.4,
}
