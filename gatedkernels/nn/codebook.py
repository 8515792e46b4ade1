"""A gate that picks every sample's mask from a few learned ones."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_int, check_number
from gatedkernels.nn.gate import ChannelGate, Gate, GateLogits
from gatedkernels.nn.masks import check_group
from gatedkernels.nn.straight_through import logistic_noise, straight_through


class Codes(NamedTuple):
    """Masks, and which of them every sample has: the arguments of `gatedkernels.ops.coded_block`.

    Attributes:
        table: Bool, shape (masks, C / group).
        codes: Int64, shape (N,).
    """

    table: Tensor
    codes: Tensor


class CodebookGate(GateLogits):
    """Decide from a layer's input which of a few learned masks its output channels have.

    Samples of one mask share everything that a mask decides, which is what GPUs want: see
    `gatedkernels.ops.coded_block`. The logits are those of `ChannelGate`, one for each mask. In training Gumbel noise
    is added to them and logistic noise to the masks' own logits, and gradients pass straight through both choices; in
    evaluation a sample has the mask of its largest logit, a mask is open where its logit is at least 0, and the
    decision carries no gradient.

    Args:
        in_channels: Channels of the input that is looked at.
        out_channels: Channels that are decided about.
        masks: How many there are.
        group: Neighbouring output channels that share one decision.
        reduction: The hidden layer has ``in_channels // reduction`` channels, at least one.
        temperature: Width of the sigmoid and the softmax that lend their slopes to the gradient.
        bias_init: Centre of the masks' logits, which start around it with deviation 1: channels start open with
            probability about ``sigmoid(bias_init)``.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``group`` does not divide ``out_channels``.

    Source:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017 (the straight-through choice);
        masks as in `ChannelGate`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        masks: int = 8,
        *,
        group: int = 1,
        reduction: int = 4,
        temperature: float = 2 / 3,
        bias_init: float = 0.0,
    ) -> None:
        check_group("out_channels", out_channels, group)
        check_int("masks", masks)
        check_number("bias_init", bias_init)
        super().__init__(in_channels, masks, reduction=reduction, temperature=temperature, bias_init=0.0)
        self.group = group
        self.masks = nn.Parameter(bias_init + torch.randn(masks, out_channels // group))

    @property
    def codebook(self) -> int:
        """How many masks there are."""
        return len(self.masks)

    def decide(self, x: Tensor) -> Codes:
        """The table and every sample's row of it, without noise, as in evaluation.

        Args:
            x: Images, shape (N, C_in, H, W).

        Raises:
            TypeError: If ``x`` is no tensor of the gate's dtype.
            ValueError: If ``x`` has another number of dimensions or channels, or lies on another device.
        """
        self._check(x)
        return Codes(self.masks.detach() >= 0, self.logits(x).detach().argmax(1))

    def forward(self, x: Tensor) -> Gate:
        """Decide for every sample; arguments, result and errors are those of `ChannelGate`."""
        if not self.training:
            table, codes = self.decide(x)
            mask = table[codes]
            return Gate(mask, mask.to(torch.promote_types(self.masks.dtype, torch.float32)))
        self._check(x)
        logits, masks = self.logits(x), self.masks.to(torch.promote_types(self.masks.dtype, torch.float32))
        choice = nn.functional.gumbel_softmax(logits, self.temperature, hard=True)
        weight = choice @ straight_through(masks + logistic_noise(masks), self.temperature)
        # Products of what are zeros and ones but for the last bit.
        mask = weight.detach() > 0.5
        return Gate(mask, mask.to(weight.dtype) + (weight - weight.detach()))

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return f"masks={self.codebook}, group={self.group}, temperature={self.temperature:.4g}"


def make_gate(
    in_channels: int, out_channels: int, *, group: int, bias_init: float | None, codebook: int | None
) -> ChannelGate | CodebookGate:
    """Make the gate of a block: every channel by itself, or the masks of a codebook.

    Args:
        in_channels: Channels of the input that is looked at.
        out_channels: Channels that are decided about.
        group: Neighbouring output channels that share one decision.
        bias_init: As the gates have it; None: `ChannelGate` has no bias, the masks of `CodebookGate` start around 0.
        codebook: Masks that a sample picks one of; None: `ChannelGate`.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``group`` does not divide ``out_channels``.
    """
    if codebook is None:
        return ChannelGate(in_channels, out_channels, group=group, bias_init=bias_init)
    check_int("codebook", codebook, optional=True)
    return CodebookGate(in_channels, out_channels, codebook, group=group, bias_init=bias_init or 0.0)
