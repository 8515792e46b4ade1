"""What a run is: a frozen, checked description that is stored beside its results."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

AugmentationName = Literal["photos", "digits"]
DataName = Literal["digits", "cifar10", "imagefolder", "synthetic"]
Measure = Literal["knn1", "knn1_folds", "linear", "linear_5_labels"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run of VICReg-Dual-Gating; every field is an option of ``gatedkernels train``."""

    recipe: str = "vicreg-dual"

    data: Annotated[DataName, "Which images to learn from."] = "digits"
    data_dir: Annotated[Path | None, "Folder of the images, for cifar10 and imagefolder."] = None
    limit: Annotated[int | None, "Use only so many images, balanced over the classes."] = None
    image_size: Annotated[int, "Side of the views."] = 32
    augmentation: Annotated[AugmentationName | None, "Which random views to take; none: those for the images."] = None
    blur: Annotated[float, "Probability of a Gaussian blur, with the augmentation for photos."] = 0.0

    width: Annotated[float, "Factor on the widths of the gated ResNet-18, whose stages have 64 to 512 channels."] = 1.0
    stem: Annotated[Stem, "First layers: for small or for large images."] = "cifar"
    stem_padding: Annotated[int, "Padding of the cifar stem."] = 2
    gate_group: Annotated[int, "Neighbouring channels that share one decision."] = 1
    gate_bias: Annotated[float | None, "Initial bias of the gates' logits; none: no bias, half of them open."] = None
    embedding: Annotated[int, "Width of the expander's layers."] = 2048

    budget: Annotated[float, "Target of the sparsity loss: the share of the FLOPs to keep."] = 0.3
    sparsity_weight: Annotated[float, "Weight of the sparsity loss."] = 5.0
    bound_weight: Annotated[float, "Weight of the bound loss, which releases the gates slowly."] = 1.0
    bound_decay: Annotated[float, "How fast the bound is released, per epoch."] = 0.02
    gate_warmup_epochs: Annotated[int, "Epochs in which both branches are dense and the gates rest."] = 0
    invariance: Annotated[float, "Weight of the invariance term."] = 25.0
    variance: Annotated[float, "Weight of the variance terms."] = 25.0
    covariance: Annotated[float, "Weight of the covariance terms."] = 1.0

    epochs: Annotated[int, "Length of the run."] = 500
    batch_size: Annotated[int, "Images in a step; the last, smaller batch of an epoch is left out."] = 256
    lr: Annotated[float, "Base learning rate."] = 0.3
    warmup_epochs: Annotated[int, "Epochs until the base learning rate is reached."] = 10
    momentum: Annotated[float, "Momentum of SGD."] = 0.9
    weight_decay: Annotated[float, "Weight decay; gates and one-dimensional parameters have none."] = 1e-4
    trust: Annotated[float, "LARS: length of a step as a fraction of the weight's norm."] = 0.02

    seed: Annotated[int, "Decides the weights, the order of the images, their views and the gates' noise."] = 0
    precision: Annotated[Precision, "Number format of the forward and backward passes."] = "32"
    device: Annotated[Device, "Where to train."] = "auto"
    workers: Annotated[int, "Processes that prepare images; the results do not depend on it."] = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            TypeError: If a value is of another type than its field.
            ValueError: If a value is out of range.
        """
        for name, annotation in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), annotation)
        for name in ("image_size", "width", "gate_group", "embedding", "epochs", "lr", "trust"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "be positive")
        for name in (
            *("stem_padding", "sparsity_weight", "bound_weight", "bound_decay", "gate_warmup_epochs", "invariance"),
            *("variance", "covariance", "warmup_epochs", "weight_decay", "seed", "workers"),
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "not be negative")
        _require("limit", self.limit, self.limit is None or self.limit > 0, "be positive")
        _require("batch_size", self.batch_size, self.batch_size >= 2, "be at least 2")
        _require("budget", self.budget, 0 < self.budget <= 1, "be above 0 and at most 1")
        _require("blur", self.blur, 0 <= self.blur <= 1, "be between 0 and 1")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "be at least 0 and below 1")
        _require(
            "warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, f"be below epochs={self.epochs}"
        )

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
        if values.get("data_dir") is not None:
            values["data_dir"] = Path(values["data_dir"])
        check_names(values)
        return cls(**values)


OPTIONS = tuple(item for item in fields(TrainConfig) if item.name != "recipe")


def check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that no run has.

    Raises:
        ValueError: If a name is unknown; the message lists those there are.
    """
    known = [item.name for item in fields(TrainConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"option must be one of {', '.join(known)}, got {name!r}")


def _require(name: str, value: Any, holds: bool, condition: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {condition}, got {value}")


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse a value of another type; whole numbers serve where floats are wanted."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    types = tuple(kind for kind in kinds if get_origin(kind) is not Literal)
    if value in choices or (isinstance(value, types) and not isinstance(value, bool)):
        return
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        return
    allowed = [*map(repr, choices), *(kind.__name__.replace("NoneType", "None") for kind in types)]
    raise (ValueError if choices else TypeError)(f"{name} must be {' or '.join(allowed)}, got {value!r}")
