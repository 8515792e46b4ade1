"""Residual blocks for inference: what `gatedkernels.nn.packed` has, put together."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedkernels.nn.blocks import Branch, GatedBasicBlock, GatedBottleneck
from gatedkernels.nn.costs import ConvCost, ConvShape, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm
from gatedkernels.nn.gate import Gate
from gatedkernels.nn.masks import check_mask
from gatedkernels.nn.packed import (
    GATE_WEIGHTS,
    NATIVE,
    Packed,
    PackedConv2d,
    PackedGate,
    Place,
    check_images,
    computed,
)
from gatedkernels.nn.packed_codebook import PackedCodebookGate, packed_gate
from gatedkernels.nn.slimmable_blocks import SlimmableBasicBlock, SlimmableBottleneck, SlimmableResidual
from gatedkernels.ops.gated_block.op import gated_block
from gatedkernels.ops.gated_conv2d.op import gated_conv2d
from gatedkernels.ops.packed import (
    holds_gate,
    pack_blocks,
    pack_rows,
    pack_tile_blocks,
    pack_tile_rows,
    spread,
    unpack_blocks,
    unpack_rows,
    worth_tiles,
)

_ops = torch.ops.gatedkernels
# Without `default` each call would look for the overload, the only one, again: see `python -m bench.dispatch`.
_packed_block, _packed_residual = _ops.packed_block.default, _ops.packed_residual.default
_packed_bottleneck = _ops.packed_bottleneck.default
_NO_GATE = (None, None, None, None)  # its layers
_NOWHERE: Place = ({"": None}, "")  # of a gate or a shortcut that a block does not have
_CONV = ("weight", "bias")
_BLOCK_WEIGHTS = ("weight1", "bias1", "weight2", "bias2", "tiles1", "tiles2")


class PackedResidual(Packed):
    """What the packed blocks share: the shortcut, their one branch, and what they cost."""

    def __init__(self, block: GatedBasicBlock | GatedBottleneck | SlimmableResidual, branch: Branch) -> None:
        super().__init__()
        self.branch: Branch = branch
        self.group = block.group
        self.gate_names = block.gate_names
        self.shapes = [ConvShape.of(conv) for conv in block.convs()]
        for name in self.gate_names:
            self.add_module(name, packed_gate(getattr(block, name)) if branch == "gated" else None)
        self.downsample = None
        if block.downsample is not None:
            conv, norm = block.downsample
            self.downsample = PackedConv2d(cast(nn.Conv2d, conv), norm, relu=False)

    def gated_channels(self) -> list[int]:
        """List how many channels each gate decides about."""
        return [shape.out_channels for shape in self.shapes[: len(self.gate_names)]]

    def _check(self, x: Tensor, branch: str | None, masks: tuple[Tensor | None, ...]) -> None:
        if branch not in (None, self.branch):
            raise ValueError(f"branch must be {self.branch!r}, which this module was optimised for, got {branch!r}")
        for name, mask, shape in zip(self.gate_names, masks, self.shapes, strict=False):
            if mask is not None:
                if self.branch == "dense":
                    raise ValueError(f"mask must be None in a module optimised for branch 'dense', got one for {name}")
                check_mask("mask", mask, x, shape.out_channels, self.group)

    def _decide(self, name: str, x: Tensor) -> Tensor | None:
        gate = self._modules[name]
        return None if gate is None else gate(x)

    def _weight(self) -> Tensor:
        return cast(Tensor, self._buffers["weight1"])  # as `kept` does it

    def _shortcut(self) -> Iterable[Tensor | None]:
        downsample = self.downsample
        return (None, None) if downsample is None else downsample.kept(_CONV)

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
        block, stored = computed(block)
        super().__init__(block, branch)
        self.stored = stored
        norm1, norm2 = block.norms(branch)
        weight1, bias1 = fold_norm(block.conv1.weight, None, norm1)
        weight2, bias2 = fold_norm(block.conv2.weight, None, norm2)
        has_tiles = weight1.dtype in NATIVE
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
        check_images(x, shape.in_channels, self._weight(), self.stored)
        if mask is not None or branch is not None:
            self._check(x, branch, (mask,))
        x = self._as_computed(x)
        if mask is None and not return_gate and self._is_one():
            return self._as_stored(self._run(x))
        if mask is None:
            mask = self._decide("gate", x)
        if mask is None:
            opened = torch.ones((x.shape[0], shape.out_channels), dtype=torch.bool, device=x.device)
        else:
            opened = spread(mask, shape.out_channels)
        residual = x if self.downsample is None else self.downsample(x)
        if x.dtype in NATIVE and shape.stride in ((1, 1), (2, 2)):
            y = _packed_block(x, *self.kept(_BLOCK_WEIGHTS), opened, residual, shape.stride[0])
        else:
            weight2 = unpack_blocks(self.weight2, len(self.bias2))
            y = gated_block(
                x, unpack_rows(self.weight1), self.bias1, weight2, self.bias2, opened,
                residual=residual, stride=shape.stride,
            )  # fmt: skip
        return (self._as_stored(y), _as_gate(mask)) if return_gate else self._as_stored(y)

    def is_simple(self) -> bool:
        """Whether the operators that decide and compute in one call serve this block."""
        return self.group == 1 and not isinstance(self._modules["gate"], PackedCodebookGate) and self._is_plain()

    def _is_plain(self) -> bool:
        downsample = self.downsample
        return (
            self._weight().dtype in NATIVE
            and self.shapes[0].stride in ((1, 1), (2, 2))
            and (downsample is None or (downsample.is_packed and downsample.extra_padding == 0))
        )

    def places(self) -> list[Place]:
        """Where these operators' arguments are kept: the gate's weights, the block's own, and the shortcut's."""
        gate, downsample = cast(PackedGate | None, self._modules["gate"]), self.downsample
        return [
            *([_NOWHERE] * len(GATE_WEIGHTS) if gate is None else gate.kept_at(GATE_WEIGHTS)),
            *self.kept_at(_BLOCK_WEIGHTS),
            *([_NOWHERE] * len(_CONV) if downsample is None else downsample.kept_at(_CONV)),
        ]

    def given_mask(self, x: Tensor) -> Tensor | None:
        """What is opened for these images instead of the gate's decision, if anything; see `fix_gates`."""
        gate = cast(PackedGate | None, self._modules["gate"])
        return None if gate is None or gate.fixed is None else gate.fixed(x.shape[0])

    def _is_one(self) -> bool:
        """Whether one operator does it all: nobody listens to the gate or the shortcut, which then are no calls."""
        gate, downsample = self._modules["gate"], self.downsample
        return (
            gate is not None
            and not _is_heard(gate)
            and (downsample is None or not _is_heard(downsample))
            and (self._is_plain() if self._weight().is_cuda else self.is_simple())
        )

    def _run(self, x: Tensor) -> Tensor:
        gate = cast(PackedGate, self._modules["gate"])
        if isinstance(gate, PackedCodebookGate):
            return self._run_coded(x, gate)
        fixed = self.given_mask(x)
        if fixed is None and self.downsample is None:
            # What is left out costs the call nothing, what is None as much as a tensor.
            return _packed_residual(x, *gate.layers(), *self.kept(_BLOCK_WEIGHTS))
        arguments = (buffers[name] for buffers, name in self.places())
        return _packed_residual(x, *arguments, fixed, self.shapes[0].stride[0])

    def chains(self, x: Tensor, branch: Branch | None) -> bool:
        """Whether ``run_chained`` serves images like these: on a GPU, where nobody listens."""
        gate = self._modules["gate"]
        return (
            x.device.type == "cuda"
            and branch in (None, self.branch)
            and type(gate) is PackedGate
            and self._is_one()
            and not _is_heard(self)
            and holds_gate(x, gate.layers())
        )

    def run_chained(self, x: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result for ``x``, and sums of it for the gate of the next block; see `gatedkernels.ops.packed_sums`."""
        check_images(x, self.shapes[0].in_channels, self.weight1)
        gate = cast(PackedGate, self._modules["gate"])
        weights, stride = (self.weight1, self.bias1, self.weight2, self.bias2), self.shapes[0].stride[0]
        y, _, left = _ops.packed_residual_summed(
            x, sums, *gate.layers(), *weights, *self._shortcut(), self.given_mask(x), stride
        )
        return y, left

    def _run_coded(self, x: Tensor, gate: PackedCodebookGate) -> Tensor:
        codes, lists = None, (gate.index, gate.count)
        if gate.fixed is not None:
            table, codes = gate.fixed(x.shape[0])
            lists = _ops.plan(spread(table, self.shapes[0].out_channels))
        weights, stride = (self.weight1, self.bias1, self.weight2, self.bias2), self.shapes[0].stride[0]
        return _ops.packed_coded_residual(x, *gate.layers(), *weights, *lists, codes, *self._shortcut(), stride)[0]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, branch: Branch | None) -> Tensor:
    """Run residual blocks one after the other; optimised ones on a GPU hand sums of their results to the next gate.

    Args:
        blocks: Gated blocks, as they are or optimised.
        x: Images, shape (N, C, H, W).
        branch: As the blocks take it.
    """
    sums: Tensor | None = None
    owned = False  # whether nobody else has seen these images
    for block in blocks:
        if isinstance(block, PackedBasicBlock) and block.chains(x, branch):
            x, sums = block.run_chained(x, sums)
            continue
        if owned and isinstance(block, PackedBottleneck) and block.overwrites(x, branch):
            block.run_over(x)
            continue
        # The operator's own: what a chain of convolutions returns may have been seen by who listens to the last one.
        owned = isinstance(block, PackedBottleneck) and not _is_heard(block) and block.is_one(x)
        x, sums = block(x, branch), None
    return x


class PackedBottleneck(PackedResidual):
    """A `GatedBottleneck` as one operation on CPUs, in float32; else, or where somebody listens, as a chain."""

    weight1: Tensor
    bias1: Tensor

    def __init__(self, block: GatedBottleneck | SlimmableBottleneck, branch: Branch) -> None:
        block, stored = computed(block)
        super().__init__(block, branch)
        self.stored = stored
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
        check_images(x, self.shapes[0].in_channels, self._weight(), self.stored)
        if mask is not None and (not isinstance(mask, tuple) or len(mask) != 2):
            raise TypeError(f"mask must be a pair, one for each gate, got {type(mask).__name__}")
        brought = mask or (None, None)
        self._check(x, branch, brought)
        x = self._as_computed(x)
        if self.is_one(x):
            y, mask1, mask2 = self._run(x, brought)
            y = self._as_stored(y)
            return (y, (_as_gate(mask1), _as_gate(mask2))) if return_gate else y
        mask1 = self._decide("gate1", x) if brought[0] is None else brought[0]
        open1 = None if mask1 is None else spread(mask1, self.shapes[0].out_channels)
        h = gated_conv2d(x, self.weight1, self.bias1, None, open1).relu_()
        mask2 = self._decide("gate2", h) if brought[1] is None else brought[1]
        open2 = None if mask2 is None else spread(mask2, self.shapes[1].out_channels)
        h = self.conv2(h, open1, open2)
        y = self._as_stored(self.conv3(h, open2, residual=x if self.downsample is None else self.downsample(x)))
        return (y, (_as_gate(mask1), _as_gate(mask2))) if return_gate else y

    def is_one(self, x: Tensor) -> bool:
        """Whether one operator does it all: in float32 on a CPU, where nobody listens to a part or has replaced it."""
        parts = [part for part in self._modules.values() if part is not None]
        convs = [part for part in parts if isinstance(part, PackedConv2d)]
        gates = [part for part in parts if type(part) is PackedGate]
        return (
            x.is_cpu
            and x.dtype == torch.float32
            and len(convs) + len(gates) == len(parts)
            and all(conv.is_packed and conv.extra_padding == 0 for conv in convs)
            and not any(map(_is_heard, parts))
        )

    def _parts(self, x: Tensor, brought: tuple[Tensor | None, Tensor | None]) -> tuple[list[Any], list[Tensor | None]]:
        """What the operator takes of it, and masks that are given instead of its gates' decisions."""
        parts: list[Tensor | None] = []
        masks = list(brought)
        for i, name in enumerate(self.gate_names):
            gate = cast(PackedGate | None, self._modules[name])
            if gate is None or masks[i] is not None:
                parts += _NO_GATE
            else:
                parts += gate.layers()
                masks[i] = None if gate.fixed is None else gate.fixed(x.shape[0])
        parts += self.kept(("weight1", "bias1"))
        for conv in (self.conv2, self.conv3):
            parts += conv.kept(_CONV)
        return [*parts, *self._shortcut()], masks

    def _run(
        self, x: Tensor, brought: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        parts, masks = self._parts(x, brought)
        y, *decided = _packed_bottleneck(x, parts, *masks, self.shapes[1].stride[0])
        if self.branch == "dense":
            return y, None, None
        mask1, mask2 = (own if given is None else given for own, given in zip(decided, masks, strict=True))
        return y, mask1, mask2

    def overwrites(self, x: Tensor, branch: Branch | None) -> bool:
        """Whether ``run_over`` serves images like these: where nobody listens, or traces."""
        return (
            self.downsample is None
            and branch in (None, self.branch)
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.stored is None
            and self.is_one(x)
            and not _is_heard(self)
            and not torch.compiler.is_compiling()
        )

    def run_over(self, x: Tensor) -> None:
        """Leave the result in ``x``, a result of the block before."""
        check_images(x, self.shapes[0].in_channels, self.weight1)
        parts, masks = self._parts(x, (None, None))
        _ops.packed_bottleneck_(x, parts, *masks)


def _is_heard(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _as_gate(mask: Tensor | None) -> Gate | None:
    return None if mask is None else Gate(mask, mask.to(torch.float32))
