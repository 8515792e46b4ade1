"""Residual blocks of any width."""

from collections.abc import Callable
from typing import ClassVar, cast

from torch import Tensor, nn

from gatedkernels._checks import check_sizes, check_type
from gatedkernels.nn.blocks import Branch
from gatedkernels.nn.slimmable import SlimmableConv2d

# Makes the normalisation of so many channels.
Norm = Callable[[int], nn.Module]


class SlimmableResidual(nn.Module):
    """What the blocks share: convolutions with normalisations, and a shortcut, under torchvision's names."""

    expansion: ClassVar[int]
    # What `optimize` asks of a block, whose dense branch this is: where others have gates.
    gate_names: ClassVar[tuple[str, ...]]
    group: ClassVar[int] = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, divisor: int) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, stride=stride, divisor=divisor)
        check_type("norm", norm, Callable, "a callable that makes a normalisation")
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = SlimmableConv2d(in_channels, out_channels, 1, stride, bias=False, divisor=divisor)
            self.downsample = nn.Sequential(shortcut, norm(out_channels))

    def convs(self) -> list[nn.Conv2d]:
        """List the convolutions, without the shortcut's, in order."""
        names = ("conv1", "conv2", "conv3")
        return [cast(nn.Conv2d, getattr(self, name)) for name in names if hasattr(self, name)]

    def norms(self, branch: Branch = "dense") -> list[nn.Module]:
        """List the normalisations, without the shortcut's, in order; there is one branch."""
        return [getattr(self, f"bn{i}") for i in range(1, len(self.convs()) + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on images (N, C_in, H, W) of the present width; shape (N, C_out, H', W')."""
        y, (*convs, last), (*norms, last_norm) = x, self.convs(), self.norms()
        for conv, norm in zip(convs, norms, strict=True):
            y = self.relu(norm(conv(y)))
        return self.relu(last_norm(last(y)) + (x if self.downsample is None else self.downsample(x)))


class SlimmableBasicBlock(SlimmableResidual):
    """Two 3×3 convolutions and a shortcut, of any width.

    Args:
        in_channels: Channels of the input at full width.
        out_channels: Channels of the output at full width.
        stride: Pixels between the windows of the first convolution.
        norm: Makes the normalisation of so many channels, such as ``SlimmableBatchNorm2d``.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none, or ``norm`` cannot be called.
        ValueError: If a number is not positive.
    """

    expansion = 1
    gate_names = ("gate",)

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, divisor: int = 8) -> None:
        super().__init__(in_channels, out_channels, stride, norm, divisor)
        self.conv1 = SlimmableConv2d(in_channels, out_channels, 3, stride, 1, bias=False, divisor=divisor)
        self.bn1 = norm(out_channels)
        self.conv2 = SlimmableConv2d(out_channels, out_channels, 3, 1, 1, bias=False, divisor=divisor)
        self.bn2 = norm(out_channels)


class SlimmableBottleneck(SlimmableResidual):
    """A 1×1, a 3×3 and a 1×1 convolution and a shortcut, of any width; the stride is the 3×3 convolution's.

    The four times as many outputs are rounded by themselves, as US3L's code does: make_divisible(4 C w), not four times
    make_divisible(C w).

    Args:
        in_channels: Channels of the input at full width.
        planes: Channels between the convolutions at full width; the output has ``4 * planes``.
        stride: Pixels between the windows of the 3×3 convolution.
        norm: Makes the normalisation of so many channels, such as ``SlimmableBatchNorm2d``.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none, or ``norm`` cannot be called.
        ValueError: If a number is not positive.
    """

    expansion = 4
    gate_names = ("gate1", "gate2")

    def __init__(self, in_channels: int, planes: int, stride: int, norm: Norm, divisor: int = 8) -> None:
        check_sizes(planes=planes)
        out_channels = planes * self.expansion
        super().__init__(in_channels, out_channels, stride, norm, divisor)
        self.conv1 = SlimmableConv2d(in_channels, planes, 1, bias=False, divisor=divisor)
        self.bn1 = norm(planes)
        self.conv2 = SlimmableConv2d(planes, planes, 3, stride, 1, bias=False, divisor=divisor)
        self.bn2 = norm(planes)
        self.conv3 = SlimmableConv2d(planes, out_channels, 1, bias=False, divisor=divisor)
        self.bn3 = norm(out_channels)
