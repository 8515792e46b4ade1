"""What the GPU benchmark runs for widths: sliced convolutions and slimmable networks against narrow ones on cuDNN."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse
from torch.nn.functional import conv2d

import gatedkernels as gk
from bench.cases import IMAGES, SHAPES, WIDTHS, _Case
from bench.gpu_time import sets_for
from bench.gpu_trials import Way, randn
from gatedkernels.nn import make_divisible

MIXED = "mixed"  # every sample has one of the widths, in turn


@dataclass(frozen=True)
class GpuSliced(_Case):
    """A 3×3 convolution of ``channels`` on ``size`` × ``size`` images, cut to a width on both sides."""

    channels: int
    size: int
    batch: int
    width: float | str
    dtype: str = "bfloat16"

    def small(self) -> "GpuSliced":
        """The same in seconds in Triton's interpreter, which knows no bfloat16."""
        return replace(self, channels=32, size=3, batch=2, dtype="float32")

    def widths(self) -> list[int]:
        """Channels of every sample."""
        chosen = WIDTHS if isinstance(self.width, str) else (self.width,)
        return [make_divisible(self.channels * chosen[n % len(chosen)]) for n in range(self.batch)]


@dataclass(frozen=True)
class GpuSlimmable(_Case):
    """A slimmable network, cut to a width."""

    model: str
    size: int
    stem: str
    batch: int
    width: float
    dtype: str = "bfloat16"

    def small(self) -> "GpuSlimmable":
        """The same in seconds."""
        return replace(self, size=16, batch=1, dtype="float32")


SLICED = tuple(GpuSliced(*shape, batch, width) for shape, batch, width in product(SHAPES, (64, 256), (*WIDTHS, MIXED)))
SLIMMABLE = tuple(
    GpuSlimmable("slimmable_resnet18", size, stem, batch, width)
    for (size, stem), batch, width in product(IMAGES, (64, 256), WIDTHS)
)


def sliced_ways(case: GpuSliced, device: str) -> Iterator[Way]:
    """A convolution of narrow images by cuDNN, from weights of that width and from slices of wide ones, and by ours.

    With mixed widths, cuDNN computes all channels of all samples and selects.
    """
    dtype, c = getattr(torch, case.dtype), case.channels
    sets = sets_for(2 * case.batch * c * case.size**2) if device == "cuda" else 2
    images = [randn(case.batch, c, case.size, case.size, device=device, dtype=dtype) for _ in range(sets)]
    weight, bias = randn(c, c, 3, 3, device=device, dtype=dtype), randn(c, device=device, dtype=dtype)
    each = torch.tensor(case.widths(), dtype=torch.int32, device=device)

    def sliced(x: Tensor, width: int | Tensor, backend: str = "triton") -> Tensor:
        return gk.sliced_conv2d(x, weight, bias, width, width, padding=1, backend=backend)

    if case.width == MIXED:
        for name, backend in (("cudnn, all and masked", "dense"), ("triton, a width for every sample", "triton")):
            yield Way(name, backend == "dense", [lambda x=x, b=backend: sliced(x, each, b) for x in images])
        return
    most = case.widths()[0]
    narrow, shift = weight[:most, :most].contiguous(memory_format=torch.channels_last), bias[:most].clone()
    thin = [x[:, :most].contiguous(memory_format=torch.channels_last) for x in images]
    yield Way("cudnn, narrow weights", True, [lambda x=x: conv2d(x, narrow, shift, 1, 1) for x in thin])
    yield Way("cudnn, slices", False, [lambda x=x: conv2d(x, weight[:most, :most], bias[:most], 1, 1) for x in thin])
    yield Way("triton, one width", False, [lambda x=x: sliced(x, most) for x in thin])
    # Images are as wide as ever, the same in their first channels; outputs beyond the width are zeros, and written.
    calls = [lambda x=x: sliced(x, each)[:, :most] for x in images]
    yield Way("triton, a width for every sample", False, calls)


def slimmable_ways(case: GpuSlimmable, device: str) -> Iterator[Way]:
    """A slimmable network at a width, and the narrow one that is cut from it, its normalisations folded."""
    dtype = getattr(torch, case.dtype)
    net = gk.models.create_model(case.model, num_classes=None, stem=case.stem)
    gk.calibrate_norms(net, [torch.randn(2, 3, case.size, case.size)], [case.width])
    net.eval().set_width(case.width)
    net.to(device, dtype, memory_format=torch.channels_last)
    images = [randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype) for _ in range(2)]
    narrow = gk.slice(net, case.width).to(memory_format=torch.channels_last).eval()
    folded = fuse(narrow).to(memory_format=torch.channels_last)
    yield Way("cudnn, narrow", True, [lambda x=x: folded(x) for x in images])
    yield Way("slimmable", False, [lambda x=x: net(x) for x in images])
    fast = gk.optimize(net, images[0])
    yield Way("slimmable, optimised", False, [lambda x=x: fast(x) for x in images])
