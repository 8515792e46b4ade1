"""What one layer costs, as a product that gates can shrink."""

from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn


@dataclass(frozen=True)
class ConvCost:
    """Multiply-adds of a convolution or linear layer, for one sample.

    A layer costs ``macs_per_pair`` for every pair of an active input channel and an active output channel.

    Attributes:
        name: Name of the layer.
        macs_per_pair: Multiply-adds that one input channel costs one output channel.
        in_channels: Input channels.
        out_channels: Output channels.
        in_gate: Key of the gate that closes input channels; None where all are open.
        out_gate: Key of the gate that closes output channels; None where all are open.
        is_overhead: Whether the layer decides for others: such layers are no part of the dense network.
    """

    name: str
    macs_per_pair: float
    in_channels: int
    out_channels: int
    in_gate: str | None = None
    out_gate: str | None = None
    is_overhead: bool = False

    @property
    def full(self) -> int:
        """Multiply-adds with every channel active."""
        return round(self.macs_per_pair * self.in_channels * self.out_channels)

    @property
    def dense(self) -> int:
        """Multiply-adds in the dense network, where nothing is decided."""
        return 0 if self.is_overhead else self.full


class ConvShape(NamedTuple):
    """What a convolution is without its weights; the fields are those of ``nn.Conv2d``."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "ConvShape":
        """Shape of a convolution whose padding is given in numbers."""
        return cls(*(cast(tuple[int, int], getattr(conv, field)) for field in cls._fields))  # type: ignore[arg-type]


def output_size(conv: nn.Conv2d | ConvShape, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a convolution's output for those of its input.

    Raises:
        ValueError: If the convolution's padding is a name.
    """
    padding, dilation, stride = conv.padding, conv.dilation, conv.stride
    if isinstance(padding, str):
        raise ValueError(f"padding must be numbers, got {padding!r}")
    height, width = (
        (length + 2 * padding[i] - dilation[i] * (conv.kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, length in enumerate(size)
    )
    return height, width


def conv_cost(
    name: str,
    conv: nn.Conv2d | ConvShape,
    out_size: tuple[int, int],
    *,
    in_gate: str | None = None,
    out_gate: str | None = None,
    is_overhead: bool = False,
) -> ConvCost:
    """Cost of a convolution whose output has the given height and width."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    macs = taps * out_size[0] * out_size[1] / conv.groups
    return ConvCost(name, macs, conv.in_channels, conv.out_channels, in_gate, out_gate, is_overhead)
