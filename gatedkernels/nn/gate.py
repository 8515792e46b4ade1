"""The gate that decides, for every sample, which channels are worth computing."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_number, check_sizes, check_type
from gatedkernels.nn.costs import ConvCost, conv_cost
from gatedkernels.nn.inputs import check_images
from gatedkernels.nn.masks import check_group, check_mask
from gatedkernels.nn.straight_through import logistic_noise, straight_through


class Gate(NamedTuple):
    """A decision: which channels are open, and the same as numbers that carry a gradient.

    Attributes:
        mask: Open channels, bool, shape (N, C / group).
        weight: ``mask`` as zeros and ones, floating point; in training with the straight-through gradient.
    """

    mask: Tensor
    weight: Tensor

    @classmethod
    def fixed(cls, name: str, mask: Tensor, x: Tensor, channels: int, group: int) -> "Gate":
        """Wrap a mask that somebody brought for samples ``x``, shape (N, …).

        Raises:
            TypeError: If the mask is not a bool tensor.
            ValueError: If its shape is not (N, channels / group), or it is not beside ``x``.
        """
        check_mask(name, mask, x, channels, group)
        return cls(mask, mask.to(torch.float32))


def check_gates(gates: Mapping[str, Gate]) -> None:
    """Refuse what are no decisions by key.

    Raises:
        TypeError: If they are something else.
    """
    check_type("gates", gates, Mapping, "a mapping of decisions by gate key")
    for key, gate in gates.items():
        check_type(f"gates[{key!r}]", gate, Gate, "a Gate")


def gate_key(name: str) -> str:
    """Key of a gate, in dicts of gates and masks, from its module's name.

    A block's only gate goes by the name of the block ("layer1.0.gate" is "layer1.0"); one of several keeps its own
    ("layer1.0.gate2").

    Raises:
        TypeError: If the name is no string.
    """
    check_type("name", name, str, "a string")
    return name.removesuffix(".gate")


class GateLogits(nn.Module):
    """Logits from a layer's input: global average pooling, 1×1 convolution, batch normalisation, ReLU, 1×1 convolution.

    Args:
        in_channels: Channels of the input that is looked at.
        logits: How many.
        reduction: The hidden layer has ``in_channels // reduction`` channels, at least one.
        temperature: Width of the sigmoid or softmax that lends its slope to the gradient.
        bias_init: Value of the last bias; None: it has none.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive.
    """

    is_gate = True

    def __init__(
        self, in_channels: int, logits: int, *, reduction: int, temperature: float, bias_init: float | None
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, reduction=reduction)
        check_number("temperature", temperature, above=0)
        check_number("bias_init", bias_init, optional=True)
        hidden = max(1, in_channels // reduction)
        self.temperature = temperature
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, logits, 1, bias=bias_init is not None)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv2.bias is not None and bias_init is not None:
            nn.init.constant_(self.conv2.bias, bias_init)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits, shape (N, logits), float32 or wider, from images of shape (N, C_in, H, W)."""
        hidden = torch.relu(self.bn(self.conv1(x.mean((2, 3), keepdim=True))))
        logits = self.conv2(hidden).flatten(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the two convolutions; see `gatedkernels.nn.flops`."""
        return [
            conv_cost(name, conv, (1, 1), is_overhead=True)
            for name, conv in (("conv1", self.conv1), ("conv2", self.conv2))
        ]

    def _check(self, x: Tensor) -> None:
        check_images(x, self.conv1.in_channels, self.conv1.weight)


class ChannelGate(GateLogits):
    """Decide from a layer's input which of its output channels to compute.

    Global average pooling, 1×1 convolution, batch normalisation, ReLU, 1×1 convolution: one logit per ``group`` output
    channels. In training logistic noise is added, so that a channel is open with probability ``sigmoid(logit)``, and
    the gradient passes straight through; in evaluation a channel is open where its logit is at least 0, and the
    decision carries no gradient.

    Args:
        in_channels: Channels of the input that is looked at.
        out_channels: Channels that are decided about.
        group: Neighbouring output channels that share one decision.
        reduction: The hidden layer has ``in_channels // reduction`` channels, at least one.
        temperature: Width of the sigmoid that lends its slope to the gradient.
        bias_init: Value of the last bias: channels start open with probability about ``sigmoid(bias_init)``. None: no
            bias, about half of the channels start open.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``group`` does not divide ``out_channels``.

    Source:
        Li et al., "Dynamic Dual Gating Neural Networks", ICCV 2021 (the channel gate).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        group: int = 1,
        reduction: int = 4,
        temperature: float = 2 / 3,
        bias_init: float | None = None,
    ) -> None:
        check_group("out_channels", out_channels, group)
        super().__init__(
            in_channels, out_channels // group, reduction=reduction, temperature=temperature, bias_init=bias_init
        )
        self.group = group

    def forward(self, x: Tensor) -> Gate:
        """Decide for every sample.

        Args:
            x: Images, shape (N, C_in, H, W).

        Returns:
            The mask, shape (N, C / group), and its weight of the same shape.

        Raises:
            TypeError: If ``x`` is no tensor of the gate's dtype.
            ValueError: If ``x`` has another number of dimensions or channels, or lies on another device.
        """
        self._check(x)
        logits = self.logits(x)
        if self.training:
            weight = straight_through(logits + logistic_noise(logits), self.temperature)
            return Gate(weight.detach() > 0, weight)
        mask = logits >= 0
        return Gate(mask, mask.to(logits.dtype))

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return f"group={self.group}, temperature={self.temperature:.4g}"
