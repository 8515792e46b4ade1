"""What the GPU benchmark runs: for each case the dense ways and the gated ones, on rotating inputs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from bench.gpu_cases import SCHEDULES, SHARED, GpuBlock, GpuConv, GpuNetwork, draw_masks
from bench.gpu_time import Call, sets_for
from gatedkernels.models import gated_resnet18, gated_resnet50
from gatedkernels.nn import GatedBasicBlock, GatedBottleneck
from gatedkernels.nn.fold import fold_norm
from gatedkernels.ops import coded_block, gated_block, gated_conv2d
from gatedkernels.ops._select import select


class Way(NamedTuple):
    """One way to serve a case: the same work on different inputs, and whether it is a dense one."""

    name: str
    dense: bool
    calls: Sequence[Call]


class Folded(NamedTuple):
    """A basic block's folded weights, in the layouts that the Triton kernels read without a copy."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    stride: int = 1

    @classmethod
    def of(cls, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, stride: int = 1) -> "Folded":
        """Lay rows of weights along what is not gated."""
        rows2 = weight2.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        return cls(weight1.contiguous(memory_format=torch.channels_last), bias1, rows2, bias2, stride)

    def dense(self, x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """The block as cuDNN computes it; with a mask, selected between the convolutions."""
        hidden = conv2d(x, self.weight1, self.bias1, self.stride, 1).relu_()
        hidden = hidden if mask is None else select(hidden, mask[:, :, None, None])
        return conv2d(hidden, self.weight2, self.bias2, 1, 1).add_(residual).relu_()

    def fused(self, x: Tensor, residual: Tensor) -> Tensor:
        """The dense block in cuDNN's convolutions that add biases and the residual themselves."""
        hidden = fused_conv(x, self.weight1, self.bias1, self.stride)
        return fused_conv(hidden, self.weight2, self.bias2, 1, residual)

    def gated(self, x: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        """The block from our kernels."""
        tensors = (self.weight1, self.bias1, self.weight2, self.bias2, mask)
        return gated_block(x, *tensors, residual=residual, stride=self.stride, backend="triton")


def block_ways(case: GpuBlock, device: str, compiled: bool = False) -> Iterator[Way]:
    """Dense, masked and gated ways through a block; the best dense one is the baseline."""
    from gatedkernels.ops.ragged.gated import gated_block as shared_block

    x, masks, block = _block_inputs(case, device)
    channels_last = block.weight2.contiguous(memory_format=torch.channels_last)
    native = block._replace(weight2=channels_last)
    yield Way("cudnn", True, [lambda x=x: native.dense(x, x) for x in x])
    yield Way("cudnn, fused", True, [lambda x=x: native.fused(x, x) for x in x])
    if compiled:
        fast = torch.compile(lambda x: native.dense(x, x), mode="max-autotune-no-cudagraphs")
        yield Way("compiled", True, [lambda x=x: fast(x) for x in x])
    yield Way("masked", False, [lambda x=x, m=m: native.dense(x, x, m) for x, m in zip(x, masks, strict=True)])
    yield Way("triton", False, [lambda x=x, m=m: block.gated(x, x, m) for x, m in zip(x, masks, strict=True)])
    for shared in SHARED[1:]:
        calls = [
            lambda x=x, m=m, shared=shared: shared_block(x, *block[:4], m, x, (1, 1), shared)
            for x, m in zip(x, masks, strict=True)
        ]
        yield Way(f"triton, {shared} samples a list", False, calls)
    calls = [
        lambda x=x, m=m: shared_block(x, *block[:4], m, x, (1, 1), SHARED[-1], similar=True)
        for x, m in zip(x, masks, strict=True)
    ]
    yield Way(f"triton, {SHARED[-1]} similar samples a list", False, calls)
    if case.masks == "codebook8":
        coded = [mask.unique(dim=0, return_inverse=True) for mask in masks]
        calls = [
            lambda x=x, c=c: coded_block(x, *block[:4], *c, residual=x, backend="triton")
            for x, c in zip(x, coded, strict=True)
        ]
        yield Way("triton, lists of the codebook", False, calls)


def schedule_ways(case: GpuBlock, device: str) -> Iterator[Way]:
    """A block whose convolutions go through their tiles as shipped, and in each of the ways that there are."""
    from gatedkernels.ops.ragged import gated, launch, measured

    x, masks, block = _block_inputs(case, device)
    native = block._replace(weight2=block.weight2.contiguous(memory_format=torch.channels_last))
    yield Way("cudnn", True, [lambda x=x: native.dense(x, x) for x in x])
    coded = [mask.unique(dim=0, return_inverse=True) for mask in masks] if case.masks == "codebook8" else []

    def run(i: int, schedule: tuple[int, int] | None = None) -> Tensor:
        if schedule is not None:
            launch.set_chooser(
                lambda shape, _: measured.find(shape, x[i].device)._replace(splits=schedule[0], programs=schedule[1])
            )
        try:
            if coded:
                return gated.coded_block(x[i], *block[:4], *coded[i], x[i], (1, 1))
            return block.gated(x[i], x[i], masks[i])
        finally:
            launch.set_chooser(None)

    yield Way("triton, as shipped", False, [lambda i=i: run(i) for i in range(len(x))])
    for name, schedule in SCHEDULES.items():
        yield Way(f"triton, {name}", False, [lambda i=i, s=schedule: run(i, s) for i in range(len(x))])


class TunedBlock(torch.nn.Module):
    """A block with one draw of masks, for `gatedkernels.tune`."""

    def __init__(self, case: GpuBlock, device: str) -> None:
        super().__init__()
        inputs, masks, self.block = _block_inputs(case, device)
        self.x, self.mask = inputs[0], masks[0]

    def forward(self, x: Tensor) -> Tensor:
        """The block on our kernels."""
        return self.block.gated(x, x, self.mask)


def conv_ways(case: GpuConv, device: str) -> Iterator[Way]:
    """The forward pass and either gradient of a dense convolution, each by itself, as PyTorch has them."""
    dtype, c = getattr(torch, case.dtype), case.channels
    images = [randn(case.batch, c, case.size, case.size, device=device, dtype=dtype) for _ in range(4)]
    weight = randn(c, c, 3, 3, device=device, dtype=dtype)
    ones = [1, 1]

    def gradient(x: Tensor, input: bool) -> object:
        return torch.ops.aten.convolution_backward(
            x, x, weight, None, ones, ones, ones, False, [0, 0], 1, [input, not input, False]
        )

    yield Way("forward", False, [lambda x=x: conv2d(x, weight, None, 1, 1) for x in images])
    yield Way("gradient of the input", False, [lambda x=x: gradient(x, True)[0] for x in images])
    yield Way("gradient of the weights", False, [lambda x=x: gradient(x, False)[1] for x in images])


def backward_ways(case: GpuBlock, device: str) -> Iterator[Way]:
    """Gradients of both convolutions of a block for given masks, from the gradients of their outputs."""
    x, masks, block = _block_inputs(case, device)
    ones, every = (1, 1), (True, True, True)
    op = torch.ops.gatedkernels.gated_conv2d_backward.default

    # Each reads the second filters as they lie.
    native = block.weight2.contiguous(memory_format=torch.channels_last)

    def both(backend: str, x: Tensor, mask: Tensor) -> None:
        weight2 = native if backend == "reference" else block.weight2
        op(x, x, weight2, mask, None, ones, ones, ones, 1, False, every, backend, 2.0)
        op(x, x, block.weight1, None, mask, ones, ones, ones, 1, False, every, backend, 2.0)

    for backend in ("reference", "triton"):
        calls = [lambda x=x, m=m, b=backend: both(b, x, m) for x, m in zip(x, masks, strict=True)]
        yield Way(backend, backend == "reference", calls)


def network_ways(case: GpuNetwork, device: str, compiled: bool = False) -> Iterator[Way]:
    """A folded ResNet with given masks against the dense one.

    PyTorch keeps one plan for a convolution, that of whoever asked first: with cuDNN's benchmark and without would be
    the same twice in one process.
    """
    dtype = getattr(torch, case.dtype)
    network = Network(case, device, dtype)
    images = [randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype) for _ in range(2)]
    yield Way("cudnn", True, [lambda x=x: network(x) for x in images])
    yield Way("cudnn, fused", True, [lambda x=x: network(x, None, "fused") for x in images])
    if compiled:
        fast = torch.compile(network, mode="max-autotune-no-cudagraphs")
        yield Way("compiled", True, [lambda x=x: fast(x) for x in images])
    draws = [network.draw(case, torch.Generator().manual_seed(seed), device) for seed in range(len(images))]
    for name in ("masked", "triton"):
        calls = [lambda x=x, m=m, name=name: network(x, m, name) for x, m in zip(images, draws, strict=True)]
        yield Way(name, False, calls)


class FoldedBottleneck(NamedTuple):
    """A bottleneck's folded filters and biases, those that listed inputs meet with rows along their outputs."""

    convs: Sequence[tuple[Tensor, Tensor]]
    stride: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels that masks decide about."""
        return tuple(len(bias) for _, bias in self.convs[:2])

    def dense(self, x: Tensor, residual: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """As cuDNN computes it; with masks, selected between the convolutions."""
        for i, (weight, bias) in enumerate(self.convs[:2]):
            x = conv2d(x, weight, bias, self.stride if i else 1, i).relu_()
            x = x if masks is None else select(x, masks[i][:, :, None, None])
        return conv2d(x, *self.convs[2]).add_(residual).relu_()

    def fused(self, x: Tensor, residual: Tensor) -> Tensor:
        """In cuDNN's convolutions that add biases and the residual themselves."""
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = self.convs
        x = fused_conv(fused_conv(x, weight1, bias1), weight2, bias2, self.stride)
        return fused_conv(x, weight3, bias3, 1, residual)

    def gated(self, x: Tensor, residual: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """From our kernels; what is open on both sides of the middle convolution is what it computes."""
        first, second = masks
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = self.convs
        options = {"backend": "triton"}
        x = gated_conv2d(x, weight1, bias1, None, first, **options).relu_()
        x = gated_conv2d(x, weight2, bias2, first, second, stride=self.stride, padding=1, **options).relu_()
        return gated_conv2d(x, weight3, bias3, second, None, **options).add_(residual).relu_()


class Network:
    """A ResNet with its normalisations folded; with masks, its blocks run on our kernels."""

    def __init__(self, case: GpuNetwork, device: str, dtype: torch.dtype) -> None:
        build = {18: gated_resnet18, 50: gated_resnet50}[case.depth]
        model = build(num_classes=None, stem=case.stem, width=case.width).eval()
        self.pool = model.maxpool
        self.stem = _folded(model.conv1, model.bn1, device, dtype)
        self.stem_stride, self.stem_padding = model.conv1.stride, model.conv1.padding
        self.blocks, self.shortcuts = [], []
        for block in (m for m in model.modules() if isinstance(m, GatedBasicBlock | GatedBottleneck)):
            convs = [
                _folded(conv, norm, device, dtype)
                for conv, norm in zip(block.convs(), block.norms("gated"), strict=True)
            ]
            if isinstance(block, GatedBasicBlock):
                self.blocks.append(Folded.of(*convs[0], *convs[1], block.conv1.stride[0]))
            else:
                self.blocks.append(FoldedBottleneck(convs, block.conv2.stride[0]))
            down = block.downsample
            self.shortcuts.append(None if down is None else _folded(down[0], down[1], device, dtype))

    def __call__(self, x: Tensor, masks: Sequence[Any] | None = None, way: str = "masked") -> Tensor:
        """Features (N, C); without masks the dense network's."""
        masks = masks or [None] * len(self.blocks)
        x = self.pool(conv2d(x, *self.stem, self.stem_stride, self.stem_padding).relu_())
        for block, shortcut, mask in zip(self.blocks, self.shortcuts, masks, strict=True):
            residual = x if shortcut is None else conv2d(x, *shortcut, block.stride)
            if way == "fused":
                x = block.fused(x, residual)
            else:
                x = block.gated(x, residual, mask) if way == "triton" else block.dense(x, residual, mask)
        return adaptive_avg_pool2d(x, 1).flatten(1)

    def draw(self, case: GpuNetwork, generator: torch.Generator, device: str) -> list[Any]:
        """A mask for each basic block, two for each bottleneck."""

        def one(width: int) -> Tensor:
            return draw_masks("independent", case.batch, width, case.kept, generator, device)

        return [
            one(len(block.weight1)) if isinstance(block, Folded) else [one(width) for width in block.widths]
            for block in self.blocks
        ]


def fused_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, residual: Tensor | None = None) -> Tensor:
    """A padded convolution with bias, residual and ReLU as one of cuDNN's; on a CPU in parts."""
    padding = weight.shape[-1] // 2
    if not x.is_cuda:
        y = conv2d(x, weight, bias, stride, padding)
        return (y if residual is None else y.add_(residual)).relu_()
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def ceilings(device: str, small: bool = False) -> Iterator[tuple[str, float, str, Callable[[], object]]]:
    """What the chip can do: a name, the amount of one call, its unit a second, and the call."""
    megabytes, side = (1, 64) if small else (4096, 8192)
    for name, size in (("copy, memory", megabytes << 20), ("copy, second-level cache", min(megabytes, 12) << 20)):
        source, target = (torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        yield name, 2e-12 * size, "TB/s", lambda s=source, t=target: t.copy_(s)
    a, b = (randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "bf16 product", 2e-12 * side**3, "TFLOP/s", lambda: a @ b


def _block_inputs(case: GpuBlock, device: str) -> tuple[list[Tensor], list[Tensor], Folded]:
    dtype, c = getattr(torch, case.dtype), case.channels
    shape = (case.batch, c, case.size, case.size)
    sets = sets_for(2 * case.batch * c * case.size**2) if device == "cuda" else 2
    generator = torch.Generator().manual_seed(0)
    x = [randn(*shape, device=device, dtype=dtype) for _ in range(sets)]
    masks = [draw_masks(case.masks, case.batch, c, case.kept, generator, device) for _ in range(sets)]
    scale = (9 * c) ** -0.5
    weights = [scale * randn(c, c, 3, 3, device=device, dtype=dtype) for _ in range(2)]
    biases = [randn(c, device=device, dtype=dtype) for _ in range(2)]
    return x, masks, Folded.of(weights[0], biases[0], weights[1], biases[1])


def _folded(conv: torch.nn.Conv2d, norm: torch.nn.Module, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = fold_norm(conv.weight, conv.bias, norm)
    weight = weight.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
    return weight, bias.detach().to(device, dtype)


def randn(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """Random numbers; images channels-last."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
