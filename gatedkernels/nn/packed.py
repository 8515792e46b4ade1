"""Gates and convolutions for inference: normalisations folded, weights packed for the kernels.

They keep the names inside the modules they replace, so that gates, masks and FLOPs go by the same keys.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gatedkernels.nn.costs import ConvCost, ConvShape, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm
from gatedkernels.nn.gate import GateLogits
from gatedkernels.nn.gated_conv import GatedConv2d
from gatedkernels.nn.inputs import check_image_shape
from gatedkernels.nn.masks import spread
from gatedkernels.nn.pages import on_large_pages
from gatedkernels.ops.channel_gate.reference import channel_gate_reference
from gatedkernels.ops.gated_conv2d.op import gated_conv2d
from gatedkernels.ops.packed import pack_blocks, unpack_blocks

_Module = TypeVar("_Module", bound=nn.Module)

# Without `default` each call would look for the overload, the only one, again: see `python -m bench.dispatch`.
_channel_gate = torch.ops.gatedkernels.channel_gate.default
_packed_conv2d = torch.ops.gatedkernels.packed_conv2d.default
GATE_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")
Place = tuple[Mapping[str, Tensor | None], str]  # where a buffer is kept
NATIVE = (torch.float32, torch.bfloat16)  # what the operators of gates and basic blocks serve


class Packed(nn.Module):
    """A module for evaluation only, whose weights are a snapshot.

    Attributes:
        stored: dtype of images and results where that of the weights is another one: float16, for which the kernels
            compute in float32.
    """

    stored: torch.dtype | None = None

    def train(self, mode: bool = True) -> "Packed":
        """Refuse to train.

        Raises:
            RuntimeError: If ``mode`` is True.
        """
        if mode:
            raise RuntimeError("an optimised module is for evaluation only; train the original and optimise it again")
        return super().train(False)

    def _apply(self, *arguments: Any) -> "Packed":
        """As ever; weights of another dtype than float32 meet images of the same."""
        super()._apply(*arguments)
        if any(buffer.dtype != torch.float32 for buffer in self.buffers()):
            self.stored = None
        return self

    def _as_computed(self, x: Tensor) -> Tensor:
        return x if self.stored is None else x.float()

    def _as_stored(self, y: Tensor) -> Tensor:
        return y if self.stored is None else y.to(self.stored)

    def _keep(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else on_large_pages(tensor))

    def kept(self, names: Iterable[str]) -> Iterator[Any]:
        """The buffers of these names, without a module's search for attributes, which takes longer than an operator."""
        return map(self._buffers.__getitem__, names)

    def kept_at(self, names: Iterable[str]) -> list[Place]:
        """Where ``kept`` finds them, for as long as the module is the same."""
        return [(self._buffers, name) for name in names]


class PackedGate(Packed):
    """A gate, its normalisation folded; returns the mask alone."""

    is_gate = True
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def __init__(self, gate: GateLogits) -> None:
        super().__init__()
        weight1, bias1 = fold_norm(gate.conv1.weight, gate.conv1.bias, gate.bn)
        weight2, bias2 = gate.conv2.weight.flatten(1), gate.conv2.bias
        self._keep(
            weight1=as_computed(weight1.flatten(1)),
            bias1=as_computed(weight1.new_zeros(len(weight1)) if bias1 is None else bias1),
            weight2=as_computed(weight2),
            bias2=as_computed(weight2.new_zeros(len(weight2)) if bias2 is None else bias2),
        )
        self.shapes = ConvShape.of(gate.conv1), ConvShape.of(gate.conv2)
        # What is opened instead of the gate's decision for so many samples; see `fix_gates`.
        self.fixed: Callable[[int], Any] | None = None
        self.eval()

    @property
    def decisions(self) -> int:
        """How many channels, or groups of them, are decided about."""
        return self.shapes[1].out_channels

    def layers(self) -> list[Tensor]:
        """Weights and bias of the hidden layer and of the last one."""
        return list(self.kept(GATE_WEIGHTS))

    def forward(self, x: Tensor) -> Tensor:
        """Mask, bool, shape (N, C / group), from the layer's input (N, C_in, H, W)."""
        mask = self._decide(x)
        return mask if self.fixed is None else self.fixed(x.shape[0])

    def _decide(self, x: Tensor) -> Tensor:
        check_images(x, self.shapes[0].in_channels, self.weight1, is_computed=True)
        return _channel_gate(x, *self.layers()) if _is_native(x) else channel_gate_reference(x, *self.layers())

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the gate's layers; see `gatedkernels.nn.flops`."""
        return [conv_cost(f"conv{i + 1}", shape, (1, 1), is_overhead=True) for i, shape in enumerate(self.shapes)]


class PackedConv2d(Packed):
    """A convolution with its normalisation, and its ReLU where it has one."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, relu: bool) -> None:
        super().__init__()
        self.shape = ConvShape.of(conv)
        self.relu = relu
        weight, bias = fold_norm(conv.weight, conv.bias, norm)
        kernel, padding = self.shape.kernel_size, self.shape.padding
        self.extra_padding = padding[0] - kernel[0] // 2
        self.is_packed = (
            kernel in ((1, 1), (3, 3))
            and padding[0] == padding[1]
            and self.extra_padding >= 0
            and self.shape.stride in ((1, 1), (2, 2))
            and self.shape.dilation == (1, 1)
            and self.shape.groups == 1
            and weight.dtype in NATIVE
        )
        self._keep(
            weight=pack_blocks(weight) if self.is_packed else weight.contiguous(memory_format=torch.channels_last),
            bias=weight.new_zeros(len(weight)) if bias is None else bias,
        )
        self.eval()

    def forward(
        self,
        x: Tensor,
        in_mask: Tensor | None = None,
        out_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve; ``in_mask`` and ``out_mask``, bool, shape (N, channels), close channels."""
        shape = self.shape
        check_images(x, shape.in_channels, self.weight)
        if self.is_packed and (x.dtype == torch.float32 or (_is_native(x) and in_mask is None and out_mask is None)):
            if self.extra_padding:
                x = pad(x, (self.extra_padding,) * 4)
            stride, channels = shape.stride[0], shape.out_channels
            return _packed_conv2d(x, self.weight, self.bias, in_mask, out_mask, residual, channels, stride, self.relu)
        weight = unpack_blocks(self.weight, shape.out_channels) if self.is_packed else self.weight
        options: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
        if in_mask is None and out_mask is None:
            y = conv2d(x, weight, self.bias, groups=shape.groups, **options)
        else:
            y = gated_conv2d(x, weight, self.bias, in_mask, out_mask, groups=shape.groups, **options)
        y = y if residual is None else y + residual
        return y.relu() if self.relu else y

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolution; see `gatedkernels.nn.flops`."""
        return [conv_cost("", self.shape, output_size(self.shape, (input_shape[-2], input_shape[-1])))]


class PackedGatedConv2d(Packed):
    """A `GatedConv2d` with its normalisation."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: GatedConv2d) -> None:
        super().__init__()
        self.shape, self.group = ConvShape.of(conv), conv.group
        weight, bias = fold_norm(conv.weight, conv.bias, conv.norm)
        self._keep(weight=weight.contiguous(memory_format=torch.channels_last), bias=bias)
        self.gate = None if conv.gate is None else PackedGate(conv.gate)
        self.activation = copy.deepcopy(conv.activation)
        self.eval()

    def forward(self, x: Tensor, in_mask: Tensor | None = None, out_mask: Tensor | None = None) -> Tensor:
        """Compute the open output channels from the open input channels; masks are those of `GatedConv2d`."""
        shape = self.shape
        check_images(x, shape.in_channels, self.weight)
        if out_mask is None and self.gate is not None:
            out_mask = self.gate(x)
        if in_mask is None and out_mask is None:
            y = conv2d(x, self.weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        else:
            y = gated_conv2d(
                x,
                self.weight,
                self.bias,
                in_mask,
                out_mask,
                stride=shape.stride,
                padding=shape.padding,
                dilation=shape.dilation,
                groups=shape.groups,
                group=self.group,
            )
        if self.activation is None:
            return y
        y = self.activation(y)
        return y if out_mask is None else y.masked_fill(~spread(out_mask, self.group), 0)

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolution; see `gatedkernels.nn.flops`."""
        size = output_size(self.shape, (input_shape[-2], input_shape[-1]))
        return [conv_cost("", self.shape, size, out_gate=None if self.gate is None else "gate")]


def _is_native(x: Tensor) -> bool:
    return x.dtype in NATIVE


def computed(module: _Module) -> tuple[_Module, torch.dtype | None]:
    """A module in the dtype that it is computed in, and its own where that is another one; see `Packed`."""
    dtype = next(module.parameters()).dtype
    return (module, None) if dtype != torch.float16 else (copy.deepcopy(module).float(), dtype)


def as_computed(weight: Tensor) -> Tensor:
    """Weights of gates in the dtype that they are computed in."""
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def check_images(
    x: Tensor, channels: int, weight: Tensor, stored: torch.dtype | None = None, is_computed: bool = False
) -> None:
    """Refuse what the kernels would misread; the operators themselves check no more than invariants.

    Args:
        x: What should be images.
        channels: Channels that they should have.
        weight: Weights that they meet.
        stored: Their dtype, if it is not that of the weights.
        is_computed: Whether the weights went through ``as_computed``.
    """
    check_image_shape(x, channels)
    if x.dtype != (stored or weight.dtype) and not (is_computed and _is_native(x) and weight.dtype in NATIVE):
        raise TypeError(f"x must have the dtype of the optimised module, {stored or weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the optimised module, {weight.device}, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("an optimised module has no gradients; differentiate the original, or call it in no_grad()")
