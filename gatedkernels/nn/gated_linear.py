"""A linear layer that computes the units its gate opens."""

import math

from torch import Tensor, nn

from gatedkernels._checks import check_sizes
from gatedkernels.nn.costs import ConvCost
from gatedkernels.nn.gate import ChannelGate, Gate
from gatedkernels.nn.gated_conv import KEEPS_ZERO
from gatedkernels.nn.inputs import check_parts, check_tokens
from gatedkernels.nn.masks import check_group, check_mask
from gatedkernels.ops.gated_linear.op import gated_linear


class GatedLinear(nn.Linear):
    """Linear layer, then activation, then mask.

    The gate looks at the mean of a sample's tokens and decides, for all of them, which units to compute; the others are
    exactly zero, and masks may be brought instead. While the gate learns, every unit is computed, because its gradient
    needs the closed ones too. Two of them make a gated multilayer perceptron: one with a gate, and one without that
    reads what the first left open.

    Without a gate and without masks this is an ordinary linear layer.

    Args:
        in_features: Channels of the input.
        out_features: Units.
        bias: Whether there is a bias.
        group: Neighbouring channels that share one decision of a mask.
        gate: Whether the layer has a gate of its own.
        activation: Activation of the output, such as ``nn.GELU()``.

    Raises:
        TypeError: If a number is none, or ``activation`` is no module.
        ValueError: If a size is not positive or ``group`` does not divide ``out_features``.

    Example:
        >>> import torch
        >>> up, down = GatedLinear(8, 32, activation=nn.GELU()).eval(), GatedLinear(32, 8, gate=False).eval()
        >>> hidden, gate = up(torch.ones(2, 5, 8), return_gate=True)
        >>> down(hidden, in_mask=gate.mask).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: int = 1,
        gate: bool = True,
        activation: nn.Module | None = None,
    ) -> None:
        check_sizes(in_features=in_features)
        check_group("out_features", out_features, group)
        check_parts(activation=activation)
        super().__init__(in_features, out_features, bias)
        self.group = group
        self.gate = ChannelGate(in_features, out_features, group=group) if gate else None
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        in_mask: Tensor | None = None,
        out_mask: Tensor | None = None,
        *,
        dense_input_grad: bool = False,
        return_gate: bool = False,
    ) -> Tensor | tuple[Tensor, Gate | None]:
        """Compute the open units from the open inputs.

        Args:
            x: Samples, shape (N, …, C_in).
            in_mask: Inputs to read, bool, shape (N, C_in / group); None for all.
            out_mask: Units to compute, bool, shape (N, C_out / group); None asks the layer's gate, if any.
            dense_input_grad: Whether ``x`` gets its gradient in closed inputs too, as the straight-through gradient of
                the gate that closed them needs it.
            return_gate: Whether to return the decision as well.

        Returns:
            Shape (N, …, C_out); with ``return_gate`` also the decision, None where there was none.

        Raises:
            TypeError: If a mask is not a bool tensor, or ``x`` no tensor of the layer's dtype.
            ValueError: If shapes or devices disagree.
        """
        check_tokens(x, self.in_features, self.weight)
        if in_mask is not None:
            check_mask("in_mask", in_mask, x, self.in_features, self.group)
        gate = self._decide(x, out_mask)
        y = self._compute(x, in_mask, gate, dense_input_grad)
        return (y, gate) if return_gate else y

    def _decide(self, x: Tensor, out_mask: Tensor | None) -> Gate | None:
        if out_mask is not None:
            return Gate.fixed("out_mask", out_mask, x, self.out_features, self.group)
        if self.gate is None:
            return None
        tokens = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        return self.gate(tokens.transpose(1, 2)[..., None])  # as the pixels of an image

    def _compute(self, x: Tensor, in_mask: Tensor | None, gate: Gate | None, dense_input_grad: bool) -> Tensor:
        learns = gate is not None and gate.weight.requires_grad
        y = gated_linear(
            x,
            self.weight,
            self.bias,
            in_mask,
            None if gate is None or learns else gate.mask,
            group=self.group,
            dense_input_grad=dense_input_grad,
        )
        y = y if self.activation is None else self.activation(y)
        if gate is None:
            return y
        if learns:
            return y * self._spread(gate.weight, x).to(y.dtype)
        if self.activation is None or isinstance(self.activation, KEEPS_ZERO):
            return y
        return y.masked_fill(~self._spread(gate.mask, x), 0)

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Each decision for the units that share it, for all tokens of ``x``."""
        values = values.repeat_interleave(self.group, dim=1)
        return values.reshape(x.shape[0], *(1,) * (x.ndim - 2), self.out_features)

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the layer; see `gatedkernels.nn.flops`."""
        tokens = math.prod(input_shape[1:-1])
        return [
            ConvCost("", tokens, self.in_features, self.out_features, out_gate=None if self.gate is None else "gate")
        ]

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return f"{super().extra_repr()}, group={self.group}"
