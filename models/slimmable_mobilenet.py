"""MobileNetV2 of any width, with torchvision's names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_choice, check_int, check_number, check_sizes
from gatedkernels.models._options import start_convolutions
from gatedkernels.models._registry import register_model
from gatedkernels.models.gated_resnet import Stem
from gatedkernels.models.slimmable_resnet import Norm, make_norm
from gatedkernels.nn import SlimmableConv2d, SlimmableNetwork
from gatedkernels.nn.slimmable import check_widths

# Expansion, channels, blocks, stride of the first one: Sandler et al., "MobileNetV2", CVPR 2018, table 2
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _LAST = 32, 1280


class _Layers:
    """Builds convolutions with their normalisations, the same way throughout a network."""

    def __init__(self, norm: Norm, widths: Sequence[float], track_running_stats: bool, divisor: int) -> None:
        self.norm: Norm = norm
        self.widths, self.tracks, self.divisor = widths, track_running_stats, divisor

    def __call__(
        self, ins: int, outs: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False, ratio: float = 1,
        in_ratio: float = 1, slices: tuple[bool, bool] = (True, True),
    ) -> tuple[nn.Module, nn.Module]:  # fmt: skip
        """A convolution and its normalisation; ``ratio`` is that of the outputs."""
        conv = SlimmableConv2d(
            ins,
            outs,
            kernel,
            stride,
            kernel // 2,
            groups=ins if depthwise else 1,
            bias=False,
            slice_in=slices[0],
            slice_out=slices[1],
            in_ratio=in_ratio,
            out_ratio=ratio,
            divisor=self.divisor,
        )
        options: dict[str, Any] = {"is_sliced": slices[1], "ratio": ratio, "divisor": self.divisor}
        return conv, make_norm(outs, self.norm, self.widths, self.tracks, **options)


class SlimmableInvertedResidual(nn.Module):
    """Expand, filter each channel, project: a block of MobileNetV2 of any width."""

    def __init__(self, ins: int, outs: int, stride: int, expansion: int, layers: _Layers) -> None:
        super().__init__()
        hidden = ins * expansion
        self.use_res_connect = stride == 1 and ins == outs
        parts: list[nn.Module] = []
        if expansion != 1:
            parts.append(nn.Sequential(*layers(ins, hidden, ratio=expansion), nn.ReLU6(inplace=True)))
        depthwise = layers(hidden, hidden, 3, stride, depthwise=True, in_ratio=expansion, ratio=expansion)
        parts.append(nn.Sequential(*depthwise, nn.ReLU6(inplace=True)))
        parts.extend(layers(hidden, outs, in_ratio=expansion))
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on images (N, C, H, W) of the present width."""
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class SlimmableMobileNetV2(SlimmableNetwork):
    """MobileNetV2 of any width from one set of weights: every layer uses its first channels.

    Modules have torchvision's names, and its state dicts load. The last 1×1 convolution always has 1280 outputs, and
    the classifier is not sliced.

    Args:
        num_classes: Outputs of the classifier; None: no classifier, the 1280 features after pooling come out.
        stem: "imagenet", or "cifar": the first convolution and the stage of 24 channels have stride 1.
        dropout: Probability before the classifier.
        norm: "shared", one scale and shift for all widths, or "switchable", all by itself for each of ``widths``.
        widths: The widths of switchable normalisations.
        track_running_stats: Whether shared normalisations have statistics; without, evaluation uses its batch's.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none, or ``widths`` are no sequence.
        ValueError: If a stem or norm does not exist or a number is out of range.

    Source:
        Sandler et al., "MobileNetV2", CVPR 2018; Yu et al., "Slimmable Neural Networks", ICLR 2019.
    """

    num_features = _LAST
    features_narrow = False

    def __init__(
        self,
        *,
        num_classes: int | None = 1000,
        stem: Stem = "imagenet",
        dropout: float = 0.2,
        norm: Norm = "shared",
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        track_running_stats: bool = True,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, Stem)
        check_int("num_classes", num_classes, optional=True)
        check_number("dropout", dropout, at_least=0, at_most=1)
        check_widths(widths)
        check_sizes(divisor=divisor)
        layers = _Layers(norm, widths, track_running_stats, divisor)
        first = layers(3, _STEM, 3, 1 if stem == "cifar" else 2, slices=(False, True))
        features: list[nn.Module] = [nn.Sequential(*first, nn.ReLU6(inplace=True))]
        ins = _STEM
        for expansion, outs, depth, stride in _STAGES:
            for j in range(depth):
                early = stem == "cifar" and outs == 24
                step = stride if j == 0 and not early else 1
                features.append(SlimmableInvertedResidual(ins, outs, step, expansion, layers))
                ins = outs
        last = layers(ins, _LAST, slices=(True, False))
        features.append(nn.Sequential(*last, nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.classifier: nn.Module = nn.Identity()
        if num_classes is not None:
            layer = nn.Linear(_LAST, num_classes)
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
            self.classifier = nn.Sequential(nn.Dropout(dropout), layer)
        start_convolutions(self)
        if norm == "switchable":
            self.set_width(max(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Run the network at its width.

        Args:
            x: Images, shape (N, 3, H, W).

        Returns:
            Logits, shape (N, num_classes), or features, shape (N, 1280).

        Raises:
            TypeError: If ``x`` is no tensor of the network's dtype.
            ValueError: If it has another shape, lies on another device, or a normalisation has no statistics for the
                width in evaluation.
        """
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x), 1), 1))


@register_model
def slimmable_mobilenet_v2(**options: Any) -> SlimmableMobileNetV2:
    """Build a slimmable MobileNetV2; the options are those of `SlimmableMobileNetV2`."""
    return SlimmableMobileNetV2(**options)
