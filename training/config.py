"""What a run is: a frozen, checked description that is stored beside its results."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

AugmentationName = Literal["photos", "digits"]
DataName = Literal["digits", "cifar10", "imagefolder", "synthetic"]
Measure = Literal["knn1", "knn1_folds", "linear", "linear_5_labels"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
Stem = Literal["cifar", "imagenet"]


def option(default: Any, help: str) -> Any:
    """Declare a field with its description, which the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run of VICReg-Dual-Gating; every field is an option of ``gatedkernels train``."""

    recipe: str = "vicreg-dual"

    data: DataName = option("digits", "Which images to learn from.")
    data_dir: Path | None = option(None, "Folder of the images, for cifar10 and imagefolder.")
    limit: int | None = option(None, "Use only so many images, balanced over the classes.")
    image_size: int = option(32, "Side of the views.")
    augmentation: AugmentationName | None = option(None, "Which random views to take; none: those for the images.")
    blur: float = option(0.0, "Probability of a Gaussian blur, with the augmentation for photos.")

    width: float = option(1.0, "Factor on the widths of the gated ResNet-18, whose stages have 64 to 512 channels.")
    stem: Stem = option("cifar", "First layers: for small or for large images.")
    stem_padding: int = option(2, "Padding of the cifar stem.")
    gate_group: int = option(1, "Neighbouring channels that share one decision.")
    gate_bias: float | None = option(None, "Initial bias of the gates' logits; none: no bias, half of them open.")
    embedding: int = option(2048, "Width of the expander's layers.")

    budget: float = option(0.3, "Target of the sparsity loss: the share of the FLOPs to keep.")
    sparsity_weight: float = option(5.0, "Weight of the sparsity loss.")
    bound_weight: float = option(1.0, "Weight of the bound loss, which releases the gates slowly.")
    bound_decay: float = option(0.02, "How fast the bound is released, per epoch.")
    gate_warmup_epochs: int = option(0, "Epochs in which both branches are dense and the gates rest.")
    invariance: float = option(25.0, "Weight of the invariance term.")
    variance: float = option(25.0, "Weight of the variance terms.")
    covariance: float = option(1.0, "Weight of the covariance terms.")

    epochs: int = option(500, "Length of the run.")
    batch_size: int = option(256, "Images in a step; the last, smaller batch of an epoch is left out.")
    lr: float = option(0.3, "Base learning rate.")
    warmup_epochs: int = option(10, "Epochs until the base learning rate is reached.")
    momentum: float = option(0.9, "Momentum of SGD.")
    weight_decay: float = option(1e-4, "Weight decay; gates and one-dimensional parameters have none.")
    trust: float = option(0.02, "LARS: length of a step as a fraction of the weight's norm.")

    seed: int = option(0, "Decides the weights, the order of the images, their views and the gates' noise.")
    precision: Precision = option("32", "Number format of the forward and backward passes.")
    device: Device = option("auto", "Where to train.")
    workers: int = option(0, "Processes that prepare images; the results do not depend on it.")

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
        _require("warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, f"be below epochs={self.epochs}")

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


OPTIONS = tuple(item for item in fields(TrainConfig) if "help" in item.metadata)


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
