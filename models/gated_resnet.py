"""ResNets whose blocks are gated, with torchvision's names."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from gatedkernels._checks import check_choice, check_int, check_number, check_type
from gatedkernels.models._options import check_block, check_layers, check_network_input, start_convolutions
from gatedkernels.models._registry import register_model
from gatedkernels.nn import Branch, Gate, GatedBasicBlock, GatedBottleneck, check_branch, gate_key, run_blocks
from gatedkernels.nn.masks import check_mask
from gatedkernels.nn.packed_trunk import PackedTrunk

Stem = Literal["imagenet", "cifar"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class GatedResNet(nn.Module):
    """A ResNet with two branches: a dense one, and one whose blocks compute what their gates open.

    Modules have torchvision's names (``conv1``, ``bn1``, ``layer1.0.conv1``, …, ``fc``). Blocks add ``bn*_gated``, the
    normalisations of the gated branch, and their gates; stem, shortcuts and classifier serve both branches.

    Gates and masks go by key: the block's name for its only gate ("layer1.0"), the gate's full name where a block has
    two ("layer1.0.gate1", "layer1.0.gate2").

    Args:
        block: `GatedBasicBlock` or `GatedBottleneck`.
        layers: Blocks in each of the four stages.
        num_classes: Outputs of the classifier; None: no classifier, the features after pooling come out.
        stem: "imagenet" (7×7, stride 2, max-pooling) or "cifar" (3×3, stride 1, no pooling).
        stem_padding: Padding of the "cifar" stem; the papers' is 2.
        width: Factor on the 64 channels of the first stage, and so on all widths.
        group: Neighbouring channels that share one decision.
        separate_norm: Whether the branches have normalisations of their own.
        gate_bias: Initial value of the gates' last bias; None: they have none.
        codebook: Masks that each gate has, every sample picking one of them (`CodebookGate`), which suits GPUs; None:
            gates decide about every channel by itself.

    Raises:
        TypeError: If the block is no such class, or a number none.
        ValueError: If the stem does not exist, there are not four ``layers``, a size is out of range, or ``group`` does
            not divide a width.
    """

    # Convolution, normalisation, activation and pooling before the blocks, for `optimize` to fold into one.
    foldable: ClassVar[tuple[tuple[str, str, str, str], ...]] = (("conv1", "bn1", "relu", "maxpool"),)
    poolings: ClassVar[tuple[str, ...]] = ("avgpool",)
    stages: ClassVar[tuple[str, ...]] = _STAGES
    trunk: PackedTrunk | None = None  # all that comes before the classifier, in an optimised copy
    default_branch: Branch = "gated"  # an optimised copy serves one branch, and it may be the other

    def __init__(
        self,
        block: type[GatedBasicBlock] | type[GatedBottleneck],
        layers: Sequence[int],
        *,
        num_classes: int | None = 1000,
        stem: Stem = "imagenet",
        stem_padding: int = 2,
        width: float = 1.0,
        group: int = 1,
        separate_norm: bool = True,
        gate_bias: float | None = None,
        codebook: int | None = None,
    ) -> None:
        super().__init__()
        check_block(block, (GatedBasicBlock, GatedBottleneck))
        check_layers(layers, len(_STAGES))
        check_choice("stem", stem, Stem)
        check_int("stem_padding", stem_padding, 0)
        check_int("num_classes", num_classes, optional=True)
        check_number("width", width, above=0)
        planes = round(64 * width)
        if planes < 1:
            raise ValueError(f"width must leave at least one of 64 channels, got {width}")
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, planes, 3, padding=stem_padding, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = planes
        options: dict[str, Any] = {
            "group": group, "separate_norm": separate_norm, "gate_bias": gate_bias, "codebook": codebook
        }  # fmt: skip
        for i, (stage, depth) in enumerate(zip(_STAGES, layers, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, planes << i, stride, **options))
                channels = (planes << i) * block.expansion
            self.add_module(stage, nn.Sequential(*blocks))
        self.avgpool: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.num_features = channels
        self.fc: nn.Module = nn.Identity() if num_classes is None else nn.Linear(channels, num_classes)
        start_convolutions(self)

    def blocks(self) -> dict[str, GatedBasicBlock | GatedBottleneck]:
        """List the residual blocks by name, in order."""
        return {f"{stage}.{i}": block for stage in _STAGES for i, block in enumerate(getattr(self, stage))}

    def gate_keys(self) -> list[str]:
        """List the keys of gates and masks, in order."""
        return [key for name, block in self.blocks().items() for key in _keys(name, block)]

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        masks: Mapping[str, Tensor] | None = None,
        return_gates: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Gate]]:
        """Run one branch.

        Args:
            x: Images, shape (N, 3, H, W).
            branch: "gated" (the default), or "dense", where gates are neither evaluated nor applied.
            masks: Masks by gate key, bool, shape (N, C / group), instead of what these gates would decide.
            return_gates: Whether to return the decisions as well.

        Returns:
            Logits, shape (N, num_classes), or features, shape (N, num_features); with ``return_gates`` also the
            decisions by gate key, none in the dense branch.

        Raises:
            TypeError: If a mask is not a bool tensor, ``masks`` no mapping, or ``x`` no tensor of the network's dtype.
            ValueError: If the branch does not exist, is dense and masks are given, a key names no gate, or shapes or
                devices disagree.
        """
        branch = branch or self.default_branch
        check_branch(branch)
        masks = self._check_masks(branch, masks)
        if self.trunk and branch == self.default_branch and not (masks or return_gates) and self.trunk.takes(x):
            return self.fc(self.trunk(x))
        check_network_input(x, self.conv1)
        for name, block in self.blocks().items() if masks else ():
            for key, channels in zip(_keys(name, block), block.gated_channels(), strict=True):
                if key in masks:
                    check_mask(f"masks[{key!r}]", masks[key], x, channels, block.group)
        gates: dict[str, Gate] = {}
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        blocks = self.blocks()
        if branch == "dense" or not (masks or return_gates):
            x, blocks = run_blocks(blocks.values(), x, branch), {}
        for name, block in blocks.items():
            keys = _keys(name, block)
            brought = tuple(masks.get(key) for key in keys)
            if len(keys) == 1:
                x, gates[keys[0]] = block(x, mask=brought[0], return_gate=True)
            else:
                x, decided = block(x, mask=brought, return_gate=True)
                gates.update(zip(keys, decided, strict=True))
        y = self.fc(self.avgpool(x))
        return (y, gates) if return_gates else y

    def _check_masks(self, branch: Branch, masks: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        if masks is None:
            return {}
        check_type("masks", masks, Mapping, "a mapping of masks by gate key")
        if not masks:
            return {}
        if branch == "dense":
            raise ValueError('masks must be None in branch "dense", got some')
        if unknown := [key for key in masks if key not in self.gate_keys()]:
            raise ValueError(f"masks must have keys among {', '.join(self.gate_keys())}, got {', '.join(unknown)}")
        return masks


def _keys(name: str, block: GatedBasicBlock | GatedBottleneck) -> list[str]:
    return [gate_key(f"{name}.{gate}") for gate in block.gate_names]


@register_model
def gated_resnet18(**options: Any) -> GatedResNet:
    """Build a gated ResNet-18; the options are those of `GatedResNet`."""
    return GatedResNet(GatedBasicBlock, (2, 2, 2, 2), **options)


@register_model
def gated_resnet34(**options: Any) -> GatedResNet:
    """Build a gated ResNet-34; the options are those of `GatedResNet`."""
    return GatedResNet(GatedBasicBlock, (3, 4, 6, 3), **options)


@register_model
def gated_resnet50(**options: Any) -> GatedResNet:
    """Build a gated ResNet-50; the options are those of `GatedResNet`."""
    return GatedResNet(GatedBottleneck, (3, 4, 6, 3), **options)
