"""Layers that serve any width: they use the first channels of their weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_int, check_number, check_sequence, check_sizes, check_type
from gatedkernels.nn.costs import ConvCost, ConvShape, conv_cost, output_size
from gatedkernels.nn.inputs import check_geometry
from gatedkernels.ops._widths import Width
from gatedkernels.ops.sliced_conv2d.op import sliced_conv2d
from gatedkernels.ops.sliced_linear.op import sliced_linear


def make_divisible(value: float, divisor: int = 8, least: int = 1) -> int:
    """Round a number of channels to a multiple of ``divisor``, at least ``least``, never down by more than a tenth.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If ``divisor`` or ``least`` is not positive.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019 (their code, after MobileNet's).

    Example:
        >>> [make_divisible(64 * width) for width in (0.9, 0.7, 0.5, 0.3, 0.25)]
        [56, 48, 32, 24, 16]
    """
    check_number("value", value)
    check_sizes(divisor=divisor, least=least)
    return _rounded(value, divisor, least)


def _rounded(value: float, divisor: int, least: int = 1) -> int:
    rounded = max(least, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def channels_at(channels: int, width: float, ratio: float = 1, divisor: int = 8) -> int:
    """How many of a layer's channels a width keeps: a rounded share, ``ratio`` times that of the layer it expands.

    Args:
        channels: Channels at full width.
        width: The width, in (0, 1].
        ratio: How many times as many channels as the layer whose number is rounded.
        divisor: What to round to a multiple of.

    Returns:
        ``make_divisible(channels * width / ratio, divisor) * ratio``, at most ``channels``; ``channels`` at width 1.
    """
    if width == 1:
        return channels
    return min(channels, round(_rounded(channels * width / ratio, divisor) * ratio))


def check_width(width: float) -> float:
    """Refuse what is no width.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it does not lie in (0, 1].
    """
    check_number("width", width, above=0, at_most=1)
    return float(width)


def check_widths(widths: Sequence[float]) -> None:
    """Refuse what is no list of widths.

    Raises:
        TypeError: If it is no sequence, or one of something other than numbers.
        ValueError: If it is empty, or one does not lie in (0, 1].
    """
    check_sequence("widths", widths, "width")
    for i, width in enumerate(widths):
        check_number(f"widths[{i}]", width, above=0, at_most=1)


class Slimmable(nn.Module):
    """A layer with a width, which `gatedkernels.nn.set_width` sets for a whole network.

    Attributes:
        width: The width of all samples; 1 where every sample has its own, for tensors are as wide then.
        sample_widths: That of every sample of a batch; empty where all have one.
    """

    width: float = 1.0
    sample_widths: tuple[float, ...] = ()

    def set_width(self, width: float) -> None:
        """Use the first channels that belong to ``width``, in (0, 1]."""
        self.width, self.sample_widths = check_width(width), ()

    def set_widths(self, widths: tuple[float, ...]) -> None:
        """Use, for every sample of a batch, the first channels that belong to its width; zeros stand behind them.

        Raises:
            ValueError: If this kind of layer cannot.
        """
        raise ValueError(f"width must be one number for {type(self).__name__}, got one for every sample")

    def check_samples(self, x: Tensor) -> None:
        """Refuse a batch that has not as many samples as there are widths."""
        check_type("x", x, Tensor, "a tensor")
        if x.ndim == 0 or len(x) != len(self.sample_widths):
            raise ValueError(f"x must hold {len(self.sample_widths)} samples, one for each width, got {tuple(x.shape)}")

    def sliced(self) -> nn.Module:
        """Make an ordinary layer of the present width, with copied weights."""
        raise NotImplementedError

    def _describe_width(self) -> str:
        return f"widths of {len(self.sample_widths)} samples" if self.sample_widths else f"width={self.width:g}"


class _SlicedWeight(Slimmable):
    """A layer whose weight's first two dimensions, outputs and inputs, are used as far as the width goes."""

    def _init_width(
        self, ins: int, outs: int, slices: tuple[bool, bool], ratios: tuple[float, float], divisor: int
    ) -> None:
        check_int("divisor", divisor)
        for name, ratio in zip(("in_ratio", "out_ratio"), ratios, strict=True):
            check_number(name, ratio, above=0)
        self.full = ins, outs
        self.slices, self.ratios, self.divisor = slices, ratios, divisor
        self.set_width(1.0)

    def set_width(self, width: float) -> None:
        """Use the first channels that belong to ``width``, in (0, 1]."""
        super().set_width(width)
        ins, outs = self._channels_at(self.width)
        # The two numbers as the shape of an empty tensor: torch.compile makes one graph for all shapes, where it would
        # make one for every value of an int that a module holds.
        self._shape = torch.empty(ins, outs, 0)

    def set_widths(self, widths: tuple[float, ...]) -> None:
        """Use, for every sample of a batch, the first channels that belong to its width; zeros stand behind them."""
        self.set_width(1.0)
        self.sample_widths = tuple(map(check_width, widths))
        channels = torch.tensor([self._channels_at(width) for width in self.sample_widths], dtype=torch.int32)
        self._each = [each.contiguous() if has else None for each, has in zip(channels.T, self.slices, strict=True)]

    def _channels_at(self, width: float) -> tuple[int, int]:
        ins, outs = (
            channels_at(channels, width, ratio, self.divisor) if is_sliced else channels
            for channels, is_sliced, ratio in zip(self.full, self.slices, self.ratios, strict=True)
        )
        return ins, outs

    @property
    def shape_now(self) -> tuple[int, int]:
        """Inputs and outputs at the present width."""
        return self._shape.shape[0], self._shape.shape[1]

    def _shape_for(self, x: Tensor) -> tuple[Width, Width]:
        """Inputs and outputs for a batch: of all samples, or of each."""
        if not self.sample_widths:
            return self.shape_now
        self.check_samples(x)
        ins, outs = (None if each is None else each.to(x.device) for each in self._each)
        return ins, outs

    def _refuse_many(self) -> None:
        if self.sample_widths:
            raise ValueError(f"width must be one number here, got one for each of {len(self.sample_widths)} samples")

    def _check_reads(self, x: Tensor, dim: int) -> None:
        """Say what the width has to do with too few channels; the operation checks all the rest."""
        ins = self.shape_now[0]
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[dim] < ins:
            raise ValueError(f"x must have at least {ins} channels at width {self.width:g}, got {tuple(x.shape)}")

    def _describe(self) -> str:
        slices = "".join(f", {name}=False" for name, has in zip(_SLICES, self.slices, strict=True) if not has)
        return f"{slices}, {self._describe_width()}"


_SLICES = "slice_in", "slice_out"


def _copied(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


class SlimmableConv2d(_SlicedWeight, nn.Conv2d):
    """A convolution of any width: of its first input channels with its first filters.

    At width w a layer of C channels has ``make_divisible(C * w)``. An input may have just as many channels, as from a
    slimmable layer before, or more: then the first ones are read. A depthwise convolution (``groups=in_channels``) has
    as many groups as inputs. The width is set from outside, for a whole network, by `gatedkernels.width` or
    ``set_width``.

    Args:
        in_channels: Channels of the input at full width.
        out_channels: Channels of the output at full width.
        kernel_size: Height and width of the filters, or one number for both.
        stride: Pixels between windows.
        padding: Zeros around the input, in numbers.
        dilation: Pixels between taps.
        groups: Groups of the convolution at full width.
        bias: Whether there is a bias.
        slice_in: Whether the input narrows with the width; not that of a first layer.
        slice_out: Whether the output does; not that of a last layer.
        in_ratio: How many times as many inputs as the layer that they expand, whose number is rounded.
        out_ratio: The same of the outputs.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none, or padding is a name.
        ValueError: If a size, stride or dilation is not positive, or ``groups`` divides no channels.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019.

    Example:
        >>> conv = SlimmableConv2d(16, 32, 3, padding=1)
        >>> conv.set_width(0.5)
        >>> conv(torch.ones(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
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
        slice_in: bool = True,
        slice_out: bool = True,
        in_ratio: float = 1,
        out_ratio: float = 1,
        divisor: int = 8,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
        check_geometry(kernel_size, stride, padding, dilation)
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._init_width(in_channels, out_channels, (slice_in, slice_out), (in_ratio, out_ratio), divisor)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the first channels of images (N, C, H, W); shape (N, outputs at this width, H', W').

        Raises:
            TypeError: If ``x`` is no tensor of the layer's dtype.
            ValueError: If ``x`` has fewer channels than this width reads, or lies on another device.
        """
        self._check_reads(x, 1)
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return sliced_conv2d(x, self.weight, self.bias, *self._shape_for(x), groups=self.groups, **geometry)

    def sliced(self) -> nn.Conv2d:
        """Make an ordinary convolution of the present width, with copied weights.

        Raises:
            ValueError: If the width ends inside a group.
        """
        self._refuse_many()
        ins, outs = self.shape_now
        group_ins, group_outs = self.weight.shape[1], self.out_channels // self.groups
        groups = 1 if self.groups == 1 else ins // group_ins
        if self.groups > 1 and (groups * group_ins != ins or groups * group_outs != outs):
            raise ValueError(f"width must end between two groups, got {self.width:g} for {self}")
        shape = ConvShape.of(self)._replace(in_channels=ins, out_channels=outs, groups=groups)
        conv = nn.Conv2d(**shape._asdict(), bias=self.bias is not None, device="meta").train(self.training)
        conv.weight = _copied(self.weight[:outs, : ins // groups])
        conv.bias = None if self.bias is None else _copied(self.bias[:outs])
        return conv

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost at the present width; see `gatedkernels.nn.flops`."""
        self._refuse_many()
        ins, outs = self.shape_now
        full = conv_cost("", self, output_size(self, (input_shape[-2], input_shape[-1])))
        # Narrower grouped convolutions have fewer groups, each of the same size.
        share = 1 if self.groups == 1 else ins / self.in_channels
        return [ConvCost("", full.macs_per_pair / share, ins, outs)]

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return super().extra_repr() + self._describe()


class FirstInputsLinear(nn.Linear):
    """A linear layer that reads the first channels of a wider input."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute all units from the first ``in_features`` channels of ``x`` (N, …, C)."""
        return super().forward(x[..., : self.in_features])


class SlimmableLinear(_SlicedWeight, nn.Linear):
    """A linear layer of any width: of its first inputs with its first units.

    At width w a layer of C channels has ``make_divisible(C * w)``. An input may have just as many channels, or more:
    then the first ones are read. The width is set from outside, as that of `SlimmableConv2d`.

    Args:
        in_features: Channels of the input at full width.
        out_features: Units at full width.
        bias: Whether there is a bias.
        slice_in: Whether the input narrows with the width.
        slice_out: Whether the output does; not that of a classifier.
        in_ratio: How many times as many inputs as the layer that they expand, whose number is rounded.
        out_ratio: The same of the outputs.
        divisor: Numbers of channels are rounded to multiples of it.
        parts: Layers that lie in this one, as queries, keys and values do: each is sliced by itself.
        wide_input: Whether the input stays as wide as ever, so that ``sliced`` has to read its first channels too.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive or ``parts`` does not divide ``out_features``.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019.

    Example:
        >>> layer = SlimmableLinear(16, 10, slice_out=False)
        >>> layer.set_width(0.5)
        >>> layer(torch.ones(2, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        slice_in: bool = True,
        slice_out: bool = True,
        in_ratio: float = 1,
        out_ratio: float = 1,
        divisor: int = 8,
        parts: int = 1,
        wide_input: bool = False,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features, parts=parts)
        if out_features % parts:
            raise ValueError(f"parts must divide the {out_features} out_features, got {parts}")
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.parts, self.wide_input = parts, wide_input
        self._init_width(in_features, out_features // parts, (slice_in, slice_out), (in_ratio, out_ratio), divisor)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the first units from the first channels of ``x`` (N, …, C); shape (N, …, units at this width).

        Raises:
            TypeError: If ``x`` is no tensor of the layer's dtype.
            ValueError: If ``x`` has fewer channels than this width reads, or lies on another device.
        """
        self._check_reads(x, -1)
        ins, outs = self._shape_for(x)
        if self.parts == 1:
            return sliced_linear(x, self.weight, self.bias, ins, outs)
        return sliced_linear(x, *self._parts(self.shape_now[1]), ins)

    def set_widths(self, widths: tuple[float, ...]) -> None:
        """Use, for every sample of a batch, the first channels that belong to its width; zeros stand behind them.

        Raises:
            ValueError: If there are several parts whose outputs narrow.
        """
        if self.parts > 1 and self.slices[1]:
            raise ValueError(f"width must be one number for a layer of {self.parts} parts, got one for every sample")
        super().set_widths(widths)

    def _parts(self, outs: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first units of every part."""
        weight = self.weight.unflatten(0, (self.parts, -1))[:, :outs].flatten(0, 1)
        return weight, None if self.bias is None else self.bias.unflatten(0, (self.parts, -1))[:, :outs].flatten()

    def sliced(self) -> nn.Linear:
        """Make an ordinary linear layer of the present width, with copied weights."""
        self._refuse_many()
        ins, outs = self.shape_now
        weight, bias = self._parts(outs)
        kind = FirstInputsLinear if self.wide_input else nn.Linear
        layer = kind(ins, outs * self.parts, bias=bias is not None, device="meta").train(self.training)
        layer.weight = _copied(weight[:, :ins])
        if bias is not None:
            layer.bias = _copied(bias)
        return layer

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost at the present width; see `gatedkernels.nn.flops`."""
        self._refuse_many()
        ins, outs = self.shape_now
        return [ConvCost("", torch.Size(input_shape[1:-1]).numel(), ins, outs * self.parts)]

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return super().extra_repr() + self._describe()
