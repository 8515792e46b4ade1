"""The same network in plain PyTorch: dense, or with its gates as masks; the yardsticks of the report.

A twin has the weights of the gated branch, normalisations folded, and the original's module names. It can be built from
a gated module as well as from what `gatedkernels.optimize` made of it.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gatedkernels.models import GatedResNet
from gatedkernels.nn import Gate, GatedConv2d, fold_norm
from gatedkernels.nn.blocks import GatedResidual
from gatedkernels.nn.costs import ConvShape
from gatedkernels.nn.masks import spread
from gatedkernels.nn.packed import PackedConv2d, PackedGatedConv2d
from gatedkernels.nn.packed_blocks import PackedBasicBlock, PackedBottleneck, PackedResidual
from gatedkernels.nn.packed_stem import PackedStem
from gatedkernels.ops.packed import unpack_blocks, unpack_rows, unpack_stem

_mkldnn = torch.ops.mkldnn


class FoldedConv2d(nn.Module):
    """A convolution with bias, then the residual if there is one, then ReLU if asked for.

    Args:
        shape: Stride, padding, dilation and groups.
        weight: Filters, shape (K, C / groups, R, S).
        bias: Shape (K,), or None.
        relu: Whether ReLU follows.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, shape: ConvShape, weight: Tensor, bias: Tensor | None, relu: bool) -> None:
        super().__init__()
        self.shape = shape
        self.relu = relu
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve images (N, C, H, W)."""
        shape = self.shape
        y = conv2d(x, self.weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y


class PrepackedConv2d(nn.Module):
    """The same in oneDNN: filters in the layout it likes best, residual and ReLU applied to each tile while it is hot.

    This is what ``torch.compile`` with freezing makes of a convolution, without the compiler. Filters are arranged
    again where the images have another size than before.
    """

    def __init__(self, conv: FoldedConv2d) -> None:
        super().__init__()
        self.conv = conv
        self.size: tuple[int, ...] | None = None
        self.filters = conv.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve images (N, C, H, W), channels-last."""
        shape, bias = self.conv.shape, self.conv.bias
        geometry = shape.padding, shape.stride, shape.dilation, shape.groups
        if tuple(x.shape) != self.size:
            self.size = tuple(x.shape)
            self.filters = _mkldnn._reorder_convolution_weight(self.conv.weight, *geometry, list(x.shape))
        activation = "relu" if self.conv.relu else "none"
        if residual is None:
            return _mkldnn._convolution_pointwise(x, self.filters, bias, *geometry, activation, [], "")
        after = "relu" if self.conv.relu else None
        return _mkldnn._convolution_pointwise.binary(
            x, residual, self.filters, bias, *geometry, "add", None, after, [], None
        )


class FoldedBlock(nn.Module):
    """A residual block: convolutions, a shortcut, and in between the masks of gates if it has any.

    Args:
        convs: The convolutions, in order.
        shortcut: The shortcut's convolution, or None.
        gates: Gates by name, each with the convolution whose output it closes; none: a dense block.
    """

    def __init__(self, convs: list[FoldedConv2d], shortcut: FoldedConv2d | None, gates: dict[str, nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.downsample = shortcut
        self.gate_names = tuple(gates)
        for name, gate in gates.items():
            self.add_module(name, gate)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on images (N, C, H, W)."""
        gates = [getattr(self, name) for name in self.gate_names]
        h = x
        for i, conv in enumerate(list(self.convs)[:-1]):
            mask = _mask(gates[i](h), conv) if gates else None
            h = conv(h)
            if mask is not None:
                h = h.mul_(mask)
        return self.convs[-1](h, x if self.downsample is None else self.downsample(x))


class FoldedGatedConv2d(nn.Module):
    """A convolution, its activation, and the mask of its gate if it has one."""

    def __init__(self, conv: FoldedConv2d, activation: nn.Module | None, gate: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.activation, self.gate = conv, activation, gate

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on images (N, C, H, W)."""
        y = self.conv(x)
        if self.activation is not None:
            y = self.activation(y)
        return y if self.gate is None else y.mul_(_mask(self.gate(x), self.conv))


def build_twin(model: nn.Module, *, gated: bool = False) -> nn.Module:
    """Build a plain PyTorch twin.

    Args:
        model: A `GatedResNet`, a gated block or a `GatedConv2d`, as it is or optimised.
        gated: Whether the gates are evaluated and multiplied with, instead of left out.

    Returns:
        A module that takes the same images, in evaluation; modules keep the original's names.

    Raises:
        TypeError: If the model is none of these.
    """
    with torch.no_grad():
        return _twin(model, gated).eval()


def prepack(twin: nn.Module) -> nn.Module:
    """Copy a dense twin, its convolutions computed by oneDNN with packed filters and fused activations.

    Raises:
        RuntimeError: If this PyTorch has no oneDNN, or the twin does not lie on the CPU in float32 or bfloat16.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("prepacked convolutions need oneDNN, which this PyTorch was built without")
    dtypes = (torch.float32, torch.bfloat16)
    if any(tensor.device.type != "cpu" or tensor.dtype not in dtypes for tensor in twin.buffers()):
        raise RuntimeError("prepacked convolutions need float32 or bfloat16 on the CPU")
    twin = copy.deepcopy(twin).to(memory_format=torch.channels_last)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FoldedConv2d):
                setattr(parent, name, PrepackedConv2d(child))
    return twin


def _twin(model: nn.Module, gated: bool) -> nn.Module:
    if isinstance(model, GatedResNet):
        return _twin_network(model, gated)
    if isinstance(model, GatedResidual | PackedResidual):
        gates = {name: copy.deepcopy(getattr(model, name)) for name in model.gate_names} if gated else {}
        return FoldedBlock(_convs(model), _shortcut(model), {k: v for k, v in gates.items() if v is not None})
    if isinstance(model, GatedConv2d):
        weight, bias = fold_norm(model.weight, model.bias, model.norm)
        conv = FoldedConv2d(ConvShape.of(model), weight, bias, relu=False)
        return FoldedGatedConv2d(conv, copy.deepcopy(model.activation), copy.deepcopy(model.gate) if gated else None)
    if isinstance(model, PackedGatedConv2d):
        conv = FoldedConv2d(model.shape, model.weight, model.bias, relu=False)
        return FoldedGatedConv2d(conv, copy.deepcopy(model.activation), copy.deepcopy(model.gate) if gated else None)
    raise TypeError(f"model must be a GatedResNet, a gated block or a GatedConv2d, got {type(model).__name__}")


def _twin_network(model: GatedResNet, gated: bool) -> nn.Module:
    conv1: Any = model.conv1
    pool: nn.Module = copy.deepcopy(model.maxpool)
    if isinstance(conv1, PackedStem):
        first: Any = next(iter(model.blocks().values()))  # the stem itself may be in another dtype
        dtype = first.weight1.dtype
        weight = unpack_stem(conv1.weight, conv1.shape.out_channels)
        stem = FoldedConv2d(conv1.shape, weight.to(dtype), conv1.bias.to(dtype), conv1.relu)
        pool = nn.MaxPool2d(3, stride=2, padding=1) if conv1.pool else pool
    else:
        stem = _unpacked(conv1) if isinstance(conv1, PackedConv2d) else _folded(conv1, model.bn1, relu=True)
    stages: dict[str, OrderedDict[str, nn.Module]] = {}
    for name, block in model.blocks().items():
        stage, index = name.split(".")
        stages.setdefault(stage, OrderedDict())[index] = _twin(block, gated)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv1=stem, maxpool=pool)
    parts.update({name: nn.Sequential(blocks) for name, blocks in stages.items()})
    parts.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=copy.deepcopy(model.fc))
    return nn.Sequential(parts)


def _convs(block: GatedResidual | PackedResidual) -> list[FoldedConv2d]:
    if isinstance(block, GatedResidual):
        return [_folded(conv, norm, relu=True) for conv, norm in zip(block.convs(), block.norms("gated"), strict=True)]
    first, second = block.shapes[0], block.shapes[1]
    if isinstance(block, PackedBasicBlock):
        return [
            FoldedConv2d(first, unpack_rows(block.weight1), block.bias1, relu=True),
            FoldedConv2d(second, unpack_blocks(block.weight2, second.out_channels), block.bias2, relu=True),
        ]
    assert isinstance(block, PackedBottleneck)
    return [
        FoldedConv2d(first, block.weight1, block.bias1, relu=True),
        _unpacked(block.conv2),
        _unpacked(block.conv3),
    ]


def _shortcut(block: GatedResidual | PackedResidual) -> FoldedConv2d | None:
    if block.downsample is None:
        return None
    if isinstance(block.downsample, PackedConv2d):
        return _unpacked(block.downsample)
    conv, norm = block.downsample
    assert isinstance(conv, nn.Conv2d)
    return _folded(conv, norm, relu=False)


def _folded(conv: nn.Conv2d, norm: nn.Module, relu: bool) -> FoldedConv2d:
    return FoldedConv2d(ConvShape.of(conv), *fold_norm(conv.weight, conv.bias, norm), relu)


def _unpacked(conv: PackedConv2d) -> FoldedConv2d:
    weight = unpack_blocks(conv.weight, conv.shape.out_channels) if conv.is_packed else conv.weight
    return FoldedConv2d(conv.shape, weight, conv.bias, conv.relu)


def _mask(decision: Gate | Tensor, conv: Any) -> Tensor:
    """A gate's decision as zeros and ones, shape (N, C, 1, 1)."""
    mask = decision.mask if isinstance(decision, Gate) else decision
    return spread(mask, conv.shape.out_channels // mask.shape[1]).to(conv.weight.dtype)
