"""A convolution that computes the channels its gate opens."""

from torch import Tensor, nn

from gatedkernels._checks import check_sizes
from gatedkernels.nn.costs import ConvCost, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm, is_foldable
from gatedkernels.nn.gate import ChannelGate, Gate
from gatedkernels.nn.inputs import check_geometry, check_images, check_parts
from gatedkernels.nn.masks import check_group, check_mask, spread
from gatedkernels.ops.gated_conv2d.op import gated_conv2d

# Activations that map zero to zero, so that what the convolution left closed stays closed.
KEEPS_ZERO = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.ELU, nn.Identity)


class GatedConv2d(nn.Conv2d):
    """Convolution, then normalisation, then activation, then mask.

    The gate looks at the input and decides, for every sample, which output channels to compute; the others are exactly
    zero, and masks may be brought instead. In evaluation a batch normalisation is folded into the weights at each call,
    so that only open channels are computed. With batch statistics, or while the gate learns, every channel is
    computed, because the statistics and the gate's gradient need the closed ones too.

    Without a gate and without masks this is an ordinary convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the filters, or one number for both.
        stride: Pixels between windows.
        padding: Zeros around the input, in numbers.
        dilation: Pixels between taps.
        groups: Groups of the convolution.
        bias: Whether there is a bias.
        group: Neighbouring channels that share one decision of a mask.
        gate: Whether the layer has a gate of its own.
        norm: Normalisation of the output, such as ``nn.BatchNorm2d(out_channels)``.
        activation: Activation behind it, such as ``nn.ReLU()``.

    Raises:
        TypeError: If a number is none, padding is a name, or ``norm`` or ``activation`` is no module.
        ValueError: If a size, stride or dilation is not positive, or ``group`` does not divide ``out_channels``.

    Example:
        >>> import torch
        >>> conv = GatedConv2d(8, 16, 3, padding=1).eval()
        >>> y, gate = conv(torch.ones(2, 8, 5, 5), return_gate=True)
        >>> y.shape, gate.mask.shape
        (torch.Size([2, 16, 5, 5]), torch.Size([2, 16]))
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        group: int = 1,
        gate: bool = True,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, groups=groups)
        check_group("out_channels", out_channels, group)
        check_geometry(kernel_size, stride, padding, dilation)
        check_parts(norm=norm, activation=activation)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.group = group
        self.gate = ChannelGate(in_channels, out_channels, group=group) if gate else None
        self.norm = norm
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
        """Compute the open output channels from the open input channels.

        Args:
            x: Images, shape (N, C_in, H, W).
            in_mask: Input channels to read, bool, shape (N, C_in / group); None for all.
            out_mask: Output channels to compute, bool, shape (N, C_out / group); None asks the layer's gate, if any.
            dense_input_grad: Whether ``x`` gets its gradient in closed input channels too, as the straight-through
                gradient of the gate that closed them needs it.
            return_gate: Whether to return the decision as well.

        Returns:
            Shape (N, C_out, H', W'); with ``return_gate`` also the decision, None where there was none.

        Raises:
            TypeError: If a mask is not a bool tensor, or ``x`` no tensor of the layer's dtype.
            ValueError: If shapes or devices disagree.
        """
        check_images(x, self.in_channels, self.weight)
        if in_mask is not None:
            check_mask("in_mask", in_mask, x, self.in_channels, self.group)
        gate = self._decide(x, out_mask)
        y = self._compute(x, in_mask, gate, dense_input_grad)
        return (y, gate) if return_gate else y

    def _decide(self, x: Tensor, out_mask: Tensor | None) -> Gate | None:
        if out_mask is not None:
            return Gate.fixed("out_mask", out_mask, x, self.out_channels, self.group)
        return None if self.gate is None else self.gate(x)

    def _compute(self, x: Tensor, in_mask: Tensor | None, gate: Gate | None, dense_input_grad: bool) -> Tensor:
        learns = gate is not None and gate.weight.requires_grad
        if gate is not None and not learns and is_foldable(self.norm):
            weight, bias = fold_norm(self.weight, self.bias, self.norm)
            y = self._activate(self._convolve(x, weight, bias, in_mask, gate.mask, dense_input_grad))
            return y if self._keeps_zero() else y.masked_fill(~spread(gate.mask, self.group), 0)

        y = self._convolve(x, self.weight, self.bias, in_mask, None, dense_input_grad)
        y = self._activate(y if self.norm is None else self.norm(y))
        if gate is None:
            return y
        if learns:
            return y * spread(gate.weight, self.group).to(y.dtype)
        return y.masked_fill(~spread(gate.mask, self.group), 0)

    def _convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_mask: Tensor | None,
        out_mask: Tensor | None,
        dense_input_grad: bool,
    ) -> Tensor:
        if in_mask is None and out_mask is None:
            return self._conv_forward(x, weight, bias)
        return gated_conv2d(
            x,
            weight,
            bias,
            in_mask,
            out_mask,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            group=self.group,
            dense_input_grad=dense_input_grad,
        )

    def _activate(self, y: Tensor) -> Tensor:
        return y if self.activation is None else self.activation(y)

    def _keeps_zero(self) -> bool:
        return self.activation is None or isinstance(self.activation, KEEPS_ZERO)

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolution; see `gatedkernels.nn.flops`."""
        out_size = output_size(self, (input_shape[-2], input_shape[-1]))
        return [conv_cost("", self, out_size, out_gate=None if self.gate is None else "gate")]

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return f"{super().extra_repr()}, group={self.group}"
