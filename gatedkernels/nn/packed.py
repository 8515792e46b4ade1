"""Gated modules for inference: normalisations folded, weights packed for the kernels.

They keep the names inside the modules they replace, so that gates, masks and FLOPs go by the same keys.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from gatedkernels.nn.blocks import Branch, GatedBasicBlock, GatedBottleneck
from gatedkernels.nn.codebook import CodebookGate
from gatedkernels.nn.costs import ConvCost, ConvShape, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm
from gatedkernels.nn.gate import Gate, GateLogits
from gatedkernels.nn.gated_conv import GatedConv2d
from gatedkernels.nn.masks import check_mask, spread
from gatedkernels.nn.pages import on_large_pages
from gatedkernels.nn.slimmable_blocks import SlimmableBasicBlock, SlimmableBottleneck, SlimmableResidual
from gatedkernels.ops.channel_gate.reference import channel_gate_reference
from gatedkernels.ops.gated_block.op import gated_block
from gatedkernels.ops.gated_conv2d.op import gated_conv2d
from gatedkernels.ops.packed import (
    pack_blocks,
    pack_rows,
    pack_tile_blocks,
    pack_tile_rows,
    unpack_blocks,
    unpack_rows,
    worth_tiles,
)
from gatedkernels.ops.plan.reference import plan_reference

_ops = torch.ops.gatedkernels
_NATIVE = (torch.float32, torch.bfloat16)
_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")
_BLOCK_WEIGHTS = (*_WEIGHTS, "tiles1", "tiles2")


class Packed(nn.Module):
    """A module for evaluation only, whose weights are a snapshot."""

    def train(self, mode: bool = True) -> "Packed":
        """Refuse to train.

        Raises:
            RuntimeError: If ``mode`` is True.
        """
        if mode:
            raise RuntimeError("an optimised module is for evaluation only; train the original and optimise it again")
        return super().train(False)

    def _keep(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else on_large_pages(tensor))


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
        return len(self.bias2)

    def layers(self) -> list[Tensor]:
        """Weights and bias of the hidden layer and of the last one."""
        return list(map(self._buffers.__getitem__, _WEIGHTS))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Mask, bool, shape (N, C / group), from the layer's input (N, C_in, H, W)."""
        mask = self._decide(x)
        return mask if self.fixed is None else self.fixed(len(x))

    def _decide(self, x: Tensor) -> Tensor:
        check_images(x, self.shapes[0].in_channels, self.weight1, is_computed=True)
        return _ops.channel_gate(x, *self.layers()) if _is_native(x) else channel_gate_reference(x, *self.layers())

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the gate's layers; see `gatedkernels.nn.flops`."""
        return [conv_cost(f"conv{i + 1}", shape, (1, 1), is_overhead=True) for i, shape in enumerate(self.shapes)]


class PackedCodebookGate(PackedGate):
    """A gate that picks masks from a table, with the lists of these; returns the mask alone."""

    table: Tensor
    index: Tensor
    count: Tensor

    def __init__(self, gate: CodebookGate) -> None:
        super().__init__(gate)
        table = gate.masks >= 0
        index, count = plan_reference(_spread(table, gate.group))
        self._keep(table=table, index=index, count=count)

    @property
    def decisions(self) -> int:
        """How many channels, or groups of them, are decided about."""
        return self.table.shape[1]

    @property
    def codebook(self) -> int:
        """How many masks there are."""
        return len(self.table)

    def forward(self, x: Tensor) -> Tensor:
        """Mask, bool, shape (N, C / group), from the layer's input (N, C_in, H, W)."""
        check_images(x, self.shapes[0].in_channels, self.weight1, is_computed=True)
        codes = _ops.code_gate(x, *self.layers())
        table, codes = (self.table, codes) if self.fixed is None else self.fixed(len(x))
        return table[codes]


def _packed_gate(gate: GateLogits) -> PackedGate:
    return PackedCodebookGate(gate) if isinstance(gate, CodebookGate) else PackedGate(gate)


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
            and weight.dtype in _NATIVE
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
            return _ops.packed_conv2d(
                x, self.weight, self.bias, in_mask, out_mask, residual, channels, stride, self.relu
            )
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


class PackedResidual(Packed):
    """What the packed blocks share: the shortcut, their one branch, and what they cost."""

    def __init__(self, block: GatedBasicBlock | GatedBottleneck | SlimmableResidual, branch: Branch) -> None:
        super().__init__()
        self.branch: Branch = branch
        self.group = block.group
        self.gate_names = block.gate_names
        self.shapes = [ConvShape.of(conv) for conv in block.convs()]
        for name in self.gate_names:
            self.add_module(name, _packed_gate(getattr(block, name)) if branch == "gated" else None)
        self.downsample = None
        if block.downsample is not None:
            conv, norm = block.downsample
            self.downsample = PackedConv2d(cast(nn.Conv2d, conv), norm, relu=False)

    def _check(self, x: Tensor, branch: str | None, masks: tuple[Tensor | None, ...]) -> None:
        if branch not in (None, self.branch):
            raise ValueError(f"branch must be {self.branch!r}, which this module was optimised for, got {branch!r}")
        for name, mask, shape in zip(self.gate_names, masks, self.shapes, strict=False):
            if mask is not None:
                if self.branch == "dense":
                    raise ValueError(f"mask must be None in a module optimised for branch 'dense', got one for {name}")
                check_mask("mask", mask, x.shape[0], shape.out_channels, self.group)
                if mask.device != x.device:
                    raise ValueError(f"mask must be on the device of x, {x.device}, got {mask.device}")

    def _decide(self, name: str, x: Tensor) -> Tensor | None:
        gate = self._modules[name]
        return None if gate is None else gate(x)

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolutions, without the gates'; see `gatedkernels.nn.flops`."""
        size = in_size = (input_shape[-2], input_shape[-1])
        names = self.gate_names if self.branch == "gated" else (None,) * len(self.gate_names)
        gates, costs = (None, *names, None), []
        for i, shape in enumerate(self.shapes):
            size = output_size(shape, size)
            costs.append(conv_cost(f"conv{i + 1}", shape, size, in_gate=gates[i], out_gate=gates[i + 1]))
        if self.downsample is not None:
            shape = self.downsample.shape
            costs.append(conv_cost("downsample.0", shape, output_size(shape, in_size)))
        return costs


class PackedBasicBlock(PackedResidual):
    """A `GatedBasicBlock` as one operation, or two where its mask is given or somebody listens to its gate."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    tiles1: Tensor | None
    tiles2: Tensor | None

    def __init__(self, block: GatedBasicBlock | SlimmableBasicBlock, branch: Branch) -> None:
        super().__init__(block, branch)
        norm1, norm2 = block.norms(branch)
        weight1, bias1 = fold_norm(block.conv1.weight, None, norm1)
        weight2, bias2 = fold_norm(block.conv2.weight, None, norm2)
        has_tiles = weight1.dtype == torch.float32
        self._keep(
            weight1=pack_rows(weight1),
            bias1=bias1,
            weight2=pack_blocks(weight2),
            bias2=bias2,
            tiles1=pack_tile_rows(weight1) if has_tiles and self.shapes[0].stride == (1, 1) else None,
            tiles2=pack_tile_blocks(weight2) if has_tiles else None,
        )
        self.eval()

    def drop_tiles(self, y: Tensor) -> None:
        """Drop the weights that serve images of a few tiles and more, if results (N, K, H, W) have fewer."""
        if not worth_tiles(y.shape[2], y.shape[3]):
            self.tiles1 = self.tiles2 = None

    def forward(
        self, x: Tensor, branch: Branch | None = None, mask: Tensor | None = None, return_gate: bool = False
    ) -> Tensor | tuple[Tensor, Gate | None]:
        """Run the block; arguments and result are those of `GatedBasicBlock`."""
        shape = self.shapes[0]
        check_images(x, shape.in_channels, self.weight1)
        if mask is not None or branch is not None:
            self._check(x, branch, (mask,))
        if mask is None and self._is_one(x):
            y, mask = self._run(x)
            return (y, _as_gate(mask)) if return_gate else y
        if mask is None:
            mask = self._decide("gate", x)
        if mask is None:
            opened = torch.ones((x.shape[0], shape.out_channels), dtype=torch.bool, device=x.device)
        else:
            opened = _spread(mask, self.group)
        residual = x if self.downsample is None else self.downsample(x)
        if _is_native(x) and shape.stride in ((1, 1), (2, 2)):
            weights = map(self._buffers.__getitem__, _BLOCK_WEIGHTS)  # the attributes, without the search for them
            y = _ops.packed_block(x, *weights, opened, residual, shape.stride[0])
        else:
            weight2 = unpack_blocks(self.weight2, len(self.bias2))
            y = gated_block(
                x, unpack_rows(self.weight1), self.bias1, weight2, self.bias2, opened,
                residual=residual, stride=shape.stride,
            )  # fmt: skip
        return (y, _as_gate(mask)) if return_gate else y

    def _is_one(self, x: Tensor) -> bool:
        """Whether one operator does it all: nobody listens to the gate or the shortcut, which then are no calls."""
        gate, downsample = self._modules["gate"], self.downsample
        return (
            gate is not None
            and not _is_heard(gate)
            and (x.device.type == "cuda" or (self.group == 1 and not isinstance(gate, PackedCodebookGate)))
            and _is_native(x)
            and self.shapes[0].stride in ((1, 1), (2, 2))
            and (downsample is None or (downsample.is_packed and downsample.extra_padding == 0))
            and (downsample is None or not _is_heard(downsample))
        )

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = cast(PackedGate, self._modules["gate"])
        if isinstance(gate, PackedCodebookGate):
            return self._run_coded(x, gate)
        fixed = None if gate.fixed is None else gate.fixed(len(x))
        decision = map(gate._buffers.__getitem__, _WEIGHTS)
        weights = map(self._buffers.__getitem__, _BLOCK_WEIGHTS)  # the attributes, without the search for them
        shortcut = (None, None) if self.downsample is None else (self.downsample.weight, self.downsample.bias)
        y, decided = _ops.packed_residual(x, *decision, *weights, *shortcut, fixed, self.shapes[0].stride[0])
        return y, decided if fixed is None else fixed

    def _run_coded(self, x: Tensor, gate: PackedCodebookGate) -> tuple[Tensor, Tensor]:
        table, codes, lists = gate.table, None, (gate.index, gate.count)
        if gate.fixed is not None:
            table, codes = gate.fixed(len(x))
            lists = _ops.plan(_spread(table, self.group))
        weights = (self.weight1, self.bias1, self.weight2, self.bias2)
        shortcut = (None, None) if self.downsample is None else (self.downsample.weight, self.downsample.bias)
        stride = self.shapes[0].stride[0]
        y, decided = _ops.packed_coded_residual(x, *gate.layers(), *weights, *lists, codes, *shortcut, stride)
        return y, table[decided if codes is None else codes]


class PackedBottleneck(PackedResidual):
    """A `GatedBottleneck` as a chain of gated convolutions."""

    weight1: Tensor
    bias1: Tensor

    def __init__(self, block: GatedBottleneck | SlimmableBottleneck, branch: Branch) -> None:
        super().__init__(block, branch)
        norm1, norm2, norm3 = block.norms(branch)
        weight1, bias1 = fold_norm(block.conv1.weight, None, norm1)
        self._keep(weight1=weight1, bias1=bias1)
        self.conv2 = PackedConv2d(block.conv2, norm2, relu=True)
        self.conv3 = PackedConv2d(block.conv3, norm3, relu=True)
        self.eval()

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        mask: tuple[Tensor | None, Tensor | None] | None = None,
        return_gate: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Gate | None, Gate | None]]:
        """Run the block; arguments and result are those of `GatedBottleneck`."""
        check_images(x, self.shapes[0].in_channels, self.weight1)
        if mask is not None and (not isinstance(mask, tuple) or len(mask) != 2):
            raise TypeError(f"mask must be a pair, one for each gate, got {type(mask).__name__}")
        brought = mask or (None, None)
        self._check(x, branch, brought)
        mask1 = self._decide("gate1", x) if brought[0] is None else brought[0]
        open1 = None if mask1 is None else _spread(mask1, self.group)
        h = gated_conv2d(x, self.weight1, self.bias1, None, open1).relu_()
        mask2 = self._decide("gate2", h) if brought[1] is None else brought[1]
        open2 = None if mask2 is None else _spread(mask2, self.group)
        h = self.conv2(h, open1, open2)
        y = self.conv3(h, open2, residual=x if self.downsample is None else self.downsample(x))
        return (y, (_as_gate(mask1), _as_gate(mask2))) if return_gate else y


def _is_native(x: Tensor) -> bool:
    """Whether the operators of gates and basic blocks serve this input: everything but other dtypes."""
    return x.dtype in _NATIVE


def as_computed(weight: Tensor) -> Tensor:
    """Weights of small layers in the dtype that they are computed in."""
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def _is_heard(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def check_images(x: Tensor, channels: int, weight: Tensor, is_computed: bool = False) -> None:
    """Refuse what the kernels would misread; the operators themselves check no more than invariants.

    Args:
        x: What should be images.
        channels: Channels that they should have.
        weight: Weights that they meet.
        is_computed: Whether these went through ``as_computed``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (N, {channels}, H, W), got {tuple(x.shape)}")
    if x.dtype != weight.dtype and not (is_computed and _is_native(x) and weight.dtype in _NATIVE):
        raise TypeError(f"x must have the dtype of the optimised module, {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the optimised module, {weight.device}, got {x.device}")


def _spread(mask: Tensor, group: int) -> Tensor:
    return mask if group == 1 else mask.repeat_interleave(group, 1)


def _as_gate(mask: Tensor | None) -> Gate | None:
    return None if mask is None else Gate(mask, mask.to(torch.float32))
