"""Residual blocks whose inner channels are gated, for every sample."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_choice, check_number, check_sizes
from gatedkernels.nn.codebook import CodebookGate, make_gate
from gatedkernels.nn.costs import ConvCost, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm, is_foldable
from gatedkernels.nn.gate import ChannelGate, Gate
from gatedkernels.nn.gated_conv import GatedConv2d
from gatedkernels.nn.inputs import check_images
from gatedkernels.nn.masks import check_group, spread
from gatedkernels.ops.gated_block.op import gated_block
from gatedkernels.ops.gated_conv2d.op import gated_conv2d

Branch = Literal["gated", "dense"]


def check_branch(branch: str) -> None:
    """Refuse a branch that does not exist.

    Raises:
        ValueError: If it does not.
    """
    check_choice("branch", branch, Branch)


class GatedResidual(nn.Module):
    """What the blocks share: a shortcut, a second set of norms, and the rule that the dense branch knows no gates."""

    expansion: ClassVar[int]
    gate_names: ClassVar[tuple[str, ...]]

    def __init__(self, in_channels: int, out_channels: int, stride: int, separate_norm: bool) -> None:
        super().__init__()
        self.separate_norm = separate_norm
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def norms(self, branch: Branch) -> list[nn.Module]:
        """List the normalisations of a branch, in order; with ``separate_norm=False`` both branches share them."""
        suffix = "_gated" if branch == "gated" and self.separate_norm else ""
        return [getattr(self, f"bn{i}{suffix}") for i in range(1, len(self.convs()) + 1)]

    def convs(self) -> list[GatedConv2d]:
        """List the convolutions, without the shortcut's, in order."""
        names = ("conv1", "conv2", "conv3")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def gated_channels(self) -> list[int]:
        """List how many channels each gate decides about."""
        return [conv.out_channels for conv in self.convs()[: len(self.gate_names)]]

    def _add_norms(self, *channels: int) -> None:
        for i, width in enumerate(channels, start=1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            if self.separate_norm:
                self.add_module(f"bn{i}_gated", nn.BatchNorm2d(width))

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def _dense(self, x: Tensor) -> Tensor:
        y, convs = x, self.convs()
        for conv, norm in zip(convs[:-1], self.norms("dense")[:-1], strict=True):
            y = self.relu(norm(conv(y)))
        return self.relu(self.norms("dense")[-1](convs[-1](y)) + self._shortcut(x))

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolutions, without the gates'; see `gatedkernels.nn.flops`."""
        size = in_size = (input_shape[-2], input_shape[-1])
        gates, costs = [None, *self.gate_names, None], []
        for i, conv in enumerate(self.convs()):
            size = output_size(conv, size)
            costs.append(conv_cost(f"conv{i + 1}", conv, size, in_gate=gates[i], out_gate=gates[i + 1]))
        if self.downsample is not None:
            shortcut = self.downsample[0]
            assert isinstance(shortcut, nn.Conv2d)
            costs.append(conv_cost("downsample.0", shortcut, output_size(shortcut, in_size)))
        return costs


class GatedBasicBlock(GatedResidual):
    """Two 3×3 convolutions and a shortcut, with a gate on the channels between the convolutions.

    The gate looks at the block's input. The dense branch leaves it alone and has normalisations of its own (``bn1``,
    ``bn2``; the gated branch's are ``bn1_gated``, ``bn2_gated``); convolutions and shortcut serve both.

    Where neither batch statistics nor the gate's gradient need the closed channels, as in evaluation, normalisations
    are folded at each call and `gated_block` computes the open channels only.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, and between the convolutions.
        stride: Pixels between the windows of the first convolution.
        group: Neighbouring channels that share one decision.
        separate_norm: Whether the branches have normalisations of their own.
        gate_bias: Initial value of the gate's last bias; None: it has none.
        codebook: Masks that the gate has, each sample picking one (`CodebookGate`); None: it decides about every
            channel by itself (`ChannelGate`).

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``group`` does not divide ``out_channels``.

    Source:
        Li et al., "Dynamic Dual Gating Neural Networks", ICCV 2021 (channel gates); Krishna et al., "Unifying Synergies
        between Self-supervised Learning and Dynamic Computation", BMVC 2023 (two branches).
    """

    expansion = 1
    gate_names = ("gate",)
    conv1: GatedConv2d
    conv2: GatedConv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        group: int = 1,
        separate_norm: bool = True,
        gate_bias: float | None = None,
        codebook: int | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, stride=stride)
        check_group("out_channels", out_channels, group)
        check_number("gate_bias", gate_bias, optional=True)
        super().__init__(in_channels, out_channels, stride, separate_norm)
        self.group = group
        ungated: dict[str, Any] = {"bias": False, "group": group, "gate": False}
        self.conv1 = GatedConv2d(in_channels, out_channels, 3, stride, 1, **ungated)
        self.conv2 = GatedConv2d(out_channels, out_channels, 3, 1, 1, **ungated)
        self._add_norms(out_channels, out_channels)
        self.gate = make_gate(in_channels, out_channels, group=group, bias_init=gate_bias, codebook=codebook)

    def forward(
        self, x: Tensor, branch: Branch = "gated", mask: Tensor | None = None, return_gate: bool = False
    ) -> Tensor | tuple[Tensor, Gate | None]:
        """Run one branch.

        Args:
            x: Images, shape (N, C_in, H, W).
            branch: "gated", or "dense", where gates are neither evaluated nor applied.
            mask: Channels to compute, bool, shape (N, C_out / group), instead of the gate's decision.
            return_gate: Whether to return the decision as well; None in the dense branch.

        Returns:
            Shape (N, C_out, H', W').

        Raises:
            TypeError: If the mask is not a bool tensor, or ``x`` no tensor of the block's dtype.
            ValueError: If the branch does not exist, is dense and a mask is given, or shapes or devices disagree.
        """
        check_branch(branch)
        check_images(x, self.conv1.in_channels, self.conv1.weight)
        if branch == "dense":
            _check_no_mask(mask)
            y = self._dense(x)
            return (y, None) if return_gate else y
        gate = _decide("mask", self.gate, x, mask, self.conv1.out_channels)
        y = self._gated(x, gate)
        return (y, gate) if return_gate else y

    def _gated(self, x: Tensor, gate: Gate) -> Tensor:
        norm1, norm2 = self.norms("gated")
        if _skips_closed(gate, norm1, norm2):
            weight1, bias1 = fold_norm(self.conv1.weight, None, norm1)
            weight2, bias2 = fold_norm(self.conv2.weight, None, norm2)
            residual, stride = self._shortcut(x), self.conv1.stride
            return gated_block(
                x, weight1, bias1, weight2, bias2, gate.mask, residual=residual, stride=stride, group=self.group
            )
        h = _gated_layer(self.conv1, norm1, x, None, gate)
        return self.relu(_conv_norm(self.conv2, norm2, h, gate) + self._shortcut(x))


class GatedBottleneck(GatedResidual):
    """A 1×1, a 3×3 and a 1×1 convolution and a shortcut, with gates on the channels of the first and second.

    ``gate1`` looks at the block's input; ``gate2`` looks at the first convolution's gated activation. The stride is the
    3×3 convolution's. Branches and normalisations are those of `GatedBasicBlock`.

    Args:
        in_channels: Channels of the input.
        planes: Channels between the convolutions; the output has ``4 * planes``.
        stride: Pixels between the windows of the 3×3 convolution.
        group: Neighbouring channels that share one decision.
        separate_norm: Whether the branches have normalisations of their own.
        gate_bias: Initial value of the gates' last bias; None: they have none.
        codebook: Masks that each gate has, as in `GatedBasicBlock`; None: gates decide about every channel.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``group`` does not divide ``planes``.

    Source:
        Li et al., "Dynamic Dual Gating Neural Networks", ICCV 2021 (channel gates).
    """

    expansion = 4
    gate_names = ("gate1", "gate2")
    conv1: GatedConv2d
    conv2: GatedConv2d
    conv3: GatedConv2d

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        group: int = 1,
        separate_norm: bool = True,
        gate_bias: float | None = None,
        codebook: int | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, stride=stride)
        check_group("planes", planes, group)
        check_number("gate_bias", gate_bias, optional=True)
        out_channels = planes * self.expansion
        super().__init__(in_channels, out_channels, stride, separate_norm)
        self.group = group
        ungated: dict[str, Any] = {"bias": False, "group": group, "gate": False}
        self.conv1 = GatedConv2d(in_channels, planes, 1, **ungated)
        self.conv2 = GatedConv2d(planes, planes, 3, stride, 1, **ungated)
        self.conv3 = GatedConv2d(planes, out_channels, 1, **ungated)
        self._add_norms(planes, planes, out_channels)
        options: dict[str, Any] = {"group": group, "bias_init": gate_bias, "codebook": codebook}
        self.gate1 = make_gate(in_channels, planes, **options)
        self.gate2 = make_gate(planes, planes, **options)

    def forward(
        self,
        x: Tensor,
        branch: Branch = "gated",
        mask: tuple[Tensor | None, Tensor | None] | None = None,
        return_gate: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Gate, Gate] | None]:
        """Run one branch.

        Args:
            x: Images, shape (N, C_in, H, W).
            branch: "gated", or "dense", where gates are neither evaluated nor applied.
            mask: Channels of the first and of the second convolution to compute, each bool, shape (N, planes / group),
                or None to ask that gate.
            return_gate: Whether to return both decisions as well; None in the dense branch.

        Returns:
            Shape (N, 4 * planes, H', W').

        Raises:
            TypeError: If a mask is not a bool tensor, or ``x`` no tensor of the block's dtype.
            ValueError: If the branch does not exist, is dense and masks are given, or shapes or devices disagree.
        """
        check_branch(branch)
        check_images(x, self.conv1.in_channels, self.conv1.weight)
        if branch == "dense":
            _check_no_mask(mask)
            y = self._dense(x)
            return (y, None) if return_gate else y
        if mask is not None and (not isinstance(mask, tuple) or len(mask) != 2):
            raise TypeError(f"mask must be a pair, one for each gate, got {type(mask).__name__}")
        mask1, mask2 = mask or (None, None)
        norm1, norm2, norm3 = self.norms("gated")
        gate1 = _decide("mask[0]", self.gate1, x, mask1, self.conv1.out_channels)
        h = _gated_layer(self.conv1, norm1, x, None, gate1)
        gate2 = _decide("mask[1]", self.gate2, h, mask2, self.conv2.out_channels)
        h = _gated_layer(self.conv2, norm2, h, gate1, gate2)
        y = self.relu(_conv_norm(self.conv3, norm3, h, gate2) + self._shortcut(x))
        return (y, (gate1, gate2)) if return_gate else y


def _check_no_mask(mask: Any) -> None:
    if mask is not None:
        raise ValueError('mask must be None in branch "dense", got one')


def _decide(name: str, gate: ChannelGate | CodebookGate, x: Tensor, mask: Tensor | None, channels: int) -> Gate:
    return gate(x) if mask is None else Gate.fixed(name, mask, x, channels, gate.group)


def _skips_closed(gate: Gate, *norms: nn.Module) -> bool:
    """Whether nobody needs the closed channels: no gradient of the gate, no batch statistics."""
    return not gate.weight.requires_grad and all(is_foldable(norm) for norm in norms)


def _gated_layer(conv: GatedConv2d, norm: nn.Module, x: Tensor, in_gate: Gate | None, gate: Gate) -> Tensor:
    """Convolution, normalisation, ReLU, mask."""
    if _skips_closed(gate, norm):
        return torch.relu(_conv_norm(conv, norm, x, in_gate, gate.mask))
    h = torch.relu(_conv_norm(conv, norm, x, in_gate))
    return h * spread(gate.weight, conv.group).to(h.dtype)


def _conv_norm(
    conv: GatedConv2d, norm: nn.Module, x: Tensor, in_gate: Gate | None, out_mask: Tensor | None = None
) -> Tensor:
    """Convolution of open input channels, then normalisation, folded into one where that is exact."""
    in_mask, learns = (None, False) if in_gate is None else (in_gate.mask, in_gate.weight.requires_grad)
    if not is_foldable(norm):
        return norm(conv(x, in_mask=in_mask, dense_input_grad=learns))
    weight, bias = fold_norm(conv.weight, None, norm)
    return gated_conv2d(
        x,
        weight,
        bias,
        in_mask,
        out_mask,
        stride=conv.stride,
        padding=conv.padding,
        group=conv.group,
        dense_input_grad=learns,
    )
