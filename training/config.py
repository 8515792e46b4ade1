"""What a run is: a frozen, checked description that is stored beside its results."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

AugmentationName = Literal["photos", "digits", "crops"]
DataName = Literal["digits", "cifar10", "imagefolder", "synthetic"]
Measure = Literal["knn1", "knn1_folds", "linear", "linear_5_labels"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
AugmentOn = Literal["workers", "device"]
Stem = Literal["cifar", "imagenet"]
BaseLoss = Literal["relative", "absolute", "keys", "queue", "similarities"]
Distillation = Literal["relative", "absolute", "keys", "none"]
SlimmableName = Literal["resnet18", "resnet34", "resnet50", "mobilenet_v2", "vit_tiny", "vit_small"]
Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has; each field is an option of ``gatedkernels train``."""

    recipe: str

    data: Annotated[DataName, "Which images to learn from."] = "digits"
    data_dir: Annotated[Path | None, "Folder of the images, for cifar10 and imagefolder."] = None
    limit: Annotated[int | None, "Use only so many images, balanced over the classes."] = None
    image_size: Annotated[int, "Side of the views."] = 32
    augmentation: Annotated[
        AugmentationName | None, "Which random views to take; none: those that fit images and method."
    ] = None
    blur: Annotated[float, "Probability of a Gaussian blur, with the augmentation for photos."] = 0.0
    augment_on: Annotated[
        AugmentOn,
        "Where views are made: by the workers, an image at a time, or on the device, a batch at a time, of images of "
        "one size, at most twice the views', that all fit into its memory.",
    ] = "workers"

    width: Annotated[
        float,
        "Size of the network: factor on its channels, 64 to 512 in a ResNet's stages; for good, unlike the widths "
        "that a slimmable network is run at.",
    ] = 1.0
    stem: Annotated[Stem, "First layers: for small or for large images."] = "cifar"
    stem_padding: Annotated[int, "Padding of the cifar stem."] = 2

    epochs: Annotated[int, "Length of the run."] = 500
    batch_size: Annotated[int, "Images in a step; the last, smaller batch of an epoch is left out."] = 256
    lr: Annotated[float, "Base learning rate."] = 0.3
    warmup_epochs: Annotated[int, "Epochs until the base learning rate is reached."] = 10
    momentum: Annotated[float, "Momentum of SGD."] = 0.9
    weight_decay: Annotated[float, "Weight decay; in vicreg-dual not of gates and one-dimensional parameters."] = 1e-4

    seed: Annotated[int, "Decides the weights, the order of the images, their views and whatever else is drawn."] = 0
    precision: Annotated[Precision, "Number format of the forward and backward passes."] = "32"
    device: Annotated[Device, "Where to train."] = "auto"
    workers: Annotated[int, "Processes that make views, unless the device does; the results do not depend on it."] = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            TypeError: If a value is of another type than its field.
            ValueError: If a value is out of range.
        """
        for name, annotation in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), annotation)
        self._require_positive("image_size", "width", "epochs", "lr")
        self._require_not_negative("stem_padding", "warmup_epochs", "weight_decay", "seed", "workers")
        _require("limit", self.limit, self.limit is None or self.limit > 0, "be positive")
        _require("batch_size", self.batch_size, self.batch_size >= 2, "be at least 2")
        _require("blur", self.blur, 0 <= self.blur <= 1, "be between 0 and 1")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "be at least 0 and below 1")
        _require(
            "warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, f"be below epochs={self.epochs}"
        )

    def _require_positive(self, *names: str) -> None:
        for name in names:
            _require(name, getattr(self, name), getattr(self, name) > 0, "be positive")

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            _require(name, getattr(self, name), getattr(self, name) >= 0, "not be negative")

    @property
    def views(self) -> AugmentationName:
        """The augmentation that is meant: for digits one that neither flips nor recolours."""
        return self.augmentation or ("digits" if self.data == "digits" else "photos")

    def to_json(self) -> str:
        """Write the configuration as JSON."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a configuration back.

        Raises:
            ValueError: If the text is no JSON object, or a field is unknown or wrong.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a configuration must be a JSON object, got {type(values).__name__}")
        for name in ("data_dir", "teacher_run"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        cls.check_names(values)
        return cls(**values)

    @classmethod
    def check_names(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that such a run does not have.

        Raises:
            ValueError: If a name is unknown; the message lists those there are.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"option must be one of {', '.join(known)}, got {name!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A training run of VICReg-Dual-Gating."""

    recipe: str = "vicreg-dual"

    embedding: Annotated[int, "Width of the embeddings."] = 2048
    gate_group: Annotated[int, "Neighbouring channels that share one decision."] = 1
    gate_codebook: Annotated[int | None, "Masks of each gate, of which a sample has one; none: any mask."] = None
    gate_bias: Annotated[float | None, "Initial bias of the gates' logits; none: no bias, half of them open."] = None

    budget: Annotated[float, "Target of the sparsity loss: the share of the FLOPs to keep."] = 0.3
    sparsity_weight: Annotated[float, "Weight of the sparsity loss."] = 5.0
    bound_weight: Annotated[float, "Weight of the bound loss, which releases the gates slowly."] = 1.0
    bound_decay: Annotated[float, "How fast the bound is released, per epoch."] = 0.02
    gate_warmup_epochs: Annotated[int, "Epochs in which both branches are dense and the gates rest."] = 0
    invariance: Annotated[float, "Weight of the invariance term."] = 25.0
    variance: Annotated[float, "Weight of the variance terms."] = 25.0
    covariance: Annotated[float, "Weight of the covariance terms."] = 1.0
    trust: Annotated[float, "LARS: length of a step as a fraction of the weight's norm."] = 0.02

    def __post_init__(self) -> None:
        """Check every value; see `RunConfig`."""
        super().__post_init__()
        self._require_positive("embedding", "gate_group", "trust")
        self._require_not_negative("sparsity_weight", "bound_weight", "bound_decay", "gate_warmup_epochs")
        self._require_not_negative("invariance", "variance", "covariance")
        codebook = self.gate_codebook
        _require("gate_codebook", codebook, codebook is None or codebook > 0, "be positive")
        _require("budget", self.budget, 0 < self.budget <= 1, "be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class SlimmableConfig(RunConfig):
    """A training run of a slimmable network, or of one at a fixed width."""

    network: Annotated[SlimmableName, "Which slimmable network; those other than ResNets have width 1."] = "resnet18"
    patch_size: Annotated[int, "Side of a vision transformer's patches."] = 16
    passes: Annotated[int, "Widths in an iteration."] = 3
    least: Annotated[float, "The narrowest width."] = 0.25
    sandwich: Annotated[bool, "Whether the widest and narrowest are always among them."] = True
    dynamic_sampling: Annotated[bool, "Whether the range of widths opens in the course of the run."] = True
    fixed_width: Annotated[float | None, "Train this width alone; none: many."] = None

    stem_padding: Annotated[int, "Padding of the cifar stem."] = 1
    warmup_epochs: Annotated[int, "Epochs until the base learning rate is reached."] = 0

    def __post_init__(self) -> None:
        """Check every value; see `RunConfig`."""
        super().__post_init__()
        self._require_positive("patch_size")
        fewest = 2 if self.sandwich else 1
        _require("passes", self.passes, self.passes >= fewest, f"be at least {fewest}")
        for name in ("least", "fixed_width"):
            value = getattr(self, name)
            _require(name, value, value is None or 0 < value <= 1, "be above 0 and at most 1")
        if not self.network.startswith("resnet"):
            _require("width", self.width, self.width == 1, f"be 1 for {self.network}")
        if self.network.startswith("vit"):
            divides = self.image_size % self.patch_size == 0
            _require("patch_size", self.patch_size, divides, f"divide image_size={self.image_size}")


@dataclass(frozen=True, kw_only=True)
class US3LConfig(SlimmableConfig):
    """A run without labels; the defaults are US3L for CIFAR.

    The cases of US3L's ablation, and the methods it is compared with, are settings of the first few fields.
    """

    recipe: str = "us3l"

    base: Annotated[
        BaseLoss,
        "Loss of the widest network: relative (NT-Xent), absolute (cosine, with a predictor), keys (InfoNCE against "
        "the other view's targets, with a predictor), queue (InfoNCE against earlier targets) or similarities (those "
        "of a frozen teacher to its earlier embeddings).",
    ] = "relative"
    distill: Annotated[Distillation, "Loss of the others against it; none: each has the base loss by itself."] = (
        "absolute"
    )
    auxiliary_head: Annotated[bool, "Whether the others have a head of their own before that loss."] = True
    predictor: Annotated[bool, "Whether the absolute and keys losses have their predictor."] = True
    base_momentum: Annotated[bool, "Whether the base loss's targets come from the momentum encoder."] = True
    distill_momentum: Annotated[bool, "Whether those of the others do; else from the widest of the iteration."] = True
    sum_gradients: Annotated[bool, "Whether the gradients of all widths make one step; else each makes its own."] = (
        False
    )
    group_strength: Annotated[float, "How much less each eighth of the channels decays than the one before."] = 0.05
    group_warmup_epochs: Annotated[int, "Epochs in which all channels decay alike."] = 0
    temperature: Annotated[float, "Of the relative losses."] = 0.5
    ema: Annotated[float, "Share of the momentum encoder that is kept in a step."] = 0.99
    ema_end: Annotated[float | None, "That share at the end, reached along half a cosine; none: always the same."] = (
        None
    )
    teacher_run: Annotated[
        Path | None, "Folder of a run whose network is the frozen teacher; none: the momentum encoder."
    ] = None
    teacher_temperature: Annotated[float, "Of a frozen teacher's similarities."] = 1e-4
    queue: Annotated[int, "Earlier targets to keep, where a loss has a queue."] = 2048
    embedding: Annotated[int, "Width of the embeddings."] = 256
    hidden: Annotated[int, "Width of the heads' hidden layers."] = 2048
    optimizer: Annotated[Optimizer, "SGD with the group penalty, or AdamW, whose decay is its own."] = "sgd"

    epochs: Annotated[int, "Length of the run."] = 400
    batch_size: Annotated[int, "Images in a step; the last, smaller batch of an epoch is left out."] = 512
    lr: Annotated[float, "Base learning rate, which falls along half a cosine."] = 0.5

    def __post_init__(self) -> None:
        """Check every value; see `RunConfig`."""
        super().__post_init__()
        self._require_positive("temperature", "teacher_temperature", "queue", "embedding", "hidden")
        self._require_not_negative("group_warmup_epochs")
        _require("ema", self.ema, 0 <= self.ema < 1, "be at least 0 and below 1")
        _require("ema_end", self.ema_end, self.ema_end is None or 0 <= self.ema_end <= 1, "be at least 0 and at most 1")
        _require("group_strength", self.group_strength, 0 <= self.group_strength < 1 / 7, "be in [0, 1/7)")
        if self.optimizer == "adamw":
            _require("group_strength", self.group_strength, self.group_strength == 0, "be 0 with adamw")


@dataclass(frozen=True, kw_only=True)
class USNetConfig(SlimmableConfig):
    """A run with labels: a universally slimmable network as its authors train MobileNets on ImageNet."""

    recipe: str = "us-net"

    soft_labels: Annotated[bool, "Whether narrow networks learn the widest's answers; else the labels, as it does."] = (
        True
    )

    passes: Annotated[int, "Widths in an iteration."] = 4
    dynamic_sampling: Annotated[bool, "Whether the range of widths opens in the course of the run."] = False
    epochs: Annotated[int, "Length of the run."] = 250
    batch_size: Annotated[int, "Images in a step; the last, smaller batch of an epoch is left out."] = 1024
    lr: Annotated[float, "Base learning rate, which falls along a line."] = 0.5
    weight_decay: Annotated[float, "Weight decay of convolutions, but depthwise ones, and of linear layers."] = 1e-4

    @property
    def views(self) -> AugmentationName:
        """The augmentation that is meant: for photos crops and flips alone."""
        return self.augmentation or ("digits" if self.data == "digits" else "crops")


CONFIGS: tuple[type[RunConfig], ...] = (TrainConfig, US3LConfig, USNetConfig)
# Every option of every run, by name; those of the same name have the same type.
OPTIONS = {item.name: item for config in reversed(CONFIGS) for item in fields(config) if item.name != "recipe"}


def _require(name: str, value: Any, holds: bool, condition: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {condition}, got {value}")


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value of another type; whole numbers serve where floats are wanted."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    types = tuple(kind for kind in kinds if get_origin(kind) is not Literal)
    if value in choices or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
        return
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        return
    allowed = [*map(repr, choices), *(kind.__name__.replace("NoneType", "None") for kind in types)]
    raise (ValueError if choices else TypeError)(f"{name} must be {' or '.join(allowed)}, got {value!r}")
