"""ResNets of any width, with torchvision's names."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from gatedkernels._checks import check_choice, check_int, check_sizes
from gatedkernels.models._options import check_block, check_layers, start_convolutions
from gatedkernels.models._registry import register_model
from gatedkernels.models.gated_resnet import Stem
from gatedkernels.nn import (
    SlimmableBasicBlock,
    SlimmableBatchNorm2d,
    SlimmableBottleneck,
    SlimmableConv2d,
    SlimmableLinear,
    SlimmableNetwork,
    SwitchableBatchNorm2d,
)
from gatedkernels.nn.packed_trunk import PackedTrunk
from gatedkernels.nn.slimmable import check_widths

Norm = Literal["shared", "switchable"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def make_norm(
    channels: int, norm: Norm, widths: Sequence[float], track_running_stats: bool, **options: Any
) -> nn.Module:
    """Build the normalisation of a slimmable convolution's output.

    Raises:
        ValueError: If there is none of this name.
    """
    check_choice("norm", norm, Norm)
    if norm == "switchable":
        return SwitchableBatchNorm2d(channels, widths, **options)
    return SlimmableBatchNorm2d(channels, track_running_stats=track_running_stats, **options)


class SlimmableResNet(SlimmableNetwork):
    """A ResNet of any width from one set of weights: every layer uses its first channels.

    Modules have torchvision's names, and its state dicts load. The stem slices its outputs, the classifier its inputs,
    every other convolution both; without a classifier the features of width w have make_divisible(512 w) dimensions
    (2048 w for bottlenecks).

    Args:
        block: `SlimmableBasicBlock` or `SlimmableBottleneck`.
        layers: Blocks in each of the four stages.
        num_classes: Outputs of the classifier; None: no classifier, the features after pooling come out.
        stem: "imagenet" (7×7, stride 2, max-pooling) or "cifar" (3×3, stride 1, no pooling).
        stem_padding: Padding of the "cifar" stem.
        channels: Channels of the first stage at full width, and so of all.
        norm: "shared", one scale and shift for all widths, or "switchable", all by itself for each of ``widths``.
        widths: The widths of switchable normalisations.
        track_running_stats: Whether shared normalisations have statistics; without, evaluation uses its batch's.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If the block is no such class, a number none, or ``widths`` are no sequence.
        ValueError: If a stem or norm does not exist, there are not four ``layers``, or a number is out of range.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019; Cao et al., US3L, CVPR 2023.
    """

    # Convolution, normalisation, activation and pooling before the blocks, for `optimize` to fold into one.
    foldable: ClassVar[tuple[tuple[str, str, str, str], ...]] = (("conv1", "bn1", "relu", "maxpool"),)
    poolings: ClassVar[tuple[str, ...]] = ("avgpool",)
    stages: ClassVar[tuple[str, ...]] = _STAGES
    trunk: PackedTrunk | None = None  # all that comes before the classifier, in an optimised copy

    def __init__(
        self,
        block: type[SlimmableBasicBlock] | type[SlimmableBottleneck],
        layers: Sequence[int],
        *,
        num_classes: int | None = 1000,
        stem: Stem = "imagenet",
        stem_padding: int = 1,
        channels: int = 64,
        norm: Norm = "shared",
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        track_running_stats: bool = True,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        check_block(block, (SlimmableBasicBlock, SlimmableBottleneck))
        check_layers(layers, len(_STAGES))
        check_choice("stem", stem, Stem)
        check_int("stem_padding", stem_padding, 0)
        check_int("num_classes", num_classes, optional=True)
        check_widths(widths)
        check_sizes(channels=channels, divisor=divisor)

        def normalise(features: int) -> nn.Module:
            return make_norm(features, norm, widths, track_running_stats, divisor=divisor)

        options: dict[str, Any] = {"bias": False, "slice_in": False, "divisor": divisor}
        if stem == "cifar":
            self.conv1 = SlimmableConv2d(3, channels, 3, padding=stem_padding, **options)
        else:
            self.conv1 = SlimmableConv2d(3, channels, 7, stride=2, padding=3, **options)
        self.bn1 = normalise(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        ins = channels
        for i, (stage, depth) in enumerate(zip(_STAGES, layers, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(ins, channels << i, 2 if i > 0 and j == 0 else 1, normalise, divisor))
                ins = (channels << i) * block.expansion
            self.add_module(stage, nn.Sequential(*blocks))
        self.avgpool: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.num_features = ins
        self.fc: nn.Module = nn.Identity()
        if num_classes is not None:
            self.fc = SlimmableLinear(ins, num_classes, slice_out=False, divisor=divisor)
        start_convolutions(self)
        if norm == "switchable":
            self.set_width(max(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Run the network at its width.

        Args:
            x: Images, shape (N, 3, H, W).

        Returns:
            Logits, shape (N, num_classes), or features, of as many dimensions as the last stage has channels.

        Raises:
            TypeError: If ``x`` is no tensor of the network's dtype.
            ValueError: If it has another shape, lies on another device, or a normalisation has no statistics for the
                width in evaluation.
        """
        if self.trunk and self.trunk.takes(x):
            return self.fc(self.trunk(x))
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in _STAGES:
            x = self.get_submodule(stage)(x)
        return self.fc(self.avgpool(x))


@register_model
def slimmable_resnet18(**options: Any) -> SlimmableResNet:
    """Build a slimmable ResNet-18; the options are those of `SlimmableResNet`."""
    return SlimmableResNet(SlimmableBasicBlock, (2, 2, 2, 2), **options)


@register_model
def slimmable_resnet34(**options: Any) -> SlimmableResNet:
    """Build a slimmable ResNet-34; the options are those of `SlimmableResNet`."""
    return SlimmableResNet(SlimmableBasicBlock, (3, 4, 6, 3), **options)


@register_model
def slimmable_resnet50(**options: Any) -> SlimmableResNet:
    """Build a slimmable ResNet-50; the options are those of `SlimmableResNet`."""
    return SlimmableResNet(SlimmableBottleneck, (3, 4, 6, 3), **options)
