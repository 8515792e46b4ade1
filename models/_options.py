"""What the networks ask of their options alike, and how their convolutions start."""

from typing import Any, get_args

from torch import nn


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ``ValueError`` unless an option is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_num_classes(num_classes: int | None) -> None:
    """Raise ``ValueError`` unless a classifier has outputs, or there is none."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be positive or None, got {num_classes}")


def start_convolutions(network: nn.Module) -> None:
    """Draw the filters as He et al. do, "Delving Deep into Rectifiers", ICCV 2015: variances kept on the way back."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
