"""torchvision's state dicts, in and out."""

import re
from collections.abc import Mapping

from torch import Tensor

from gatedkernels._checks import check_type
from gatedkernels.models.gated_resnet import GatedResNet
from gatedkernels.nn import Branch, check_branch

_GATE = re.compile(r"\.gate[12]?\.")
_NORM = re.compile(r"(layer\d+\.\d+\.bn\d)\.")
_GATED_NORM = re.compile(r"(\.bn\d)_gated\.")


def load_torchvision(model: GatedResNet, state_dict: Mapping[str, Tensor]) -> GatedResNet:
    """Load the weights of torchvision's ResNet of the same depth.

    The normalisations of the gated branch become copies of the dense branch's; gates keep their weights. A classifier
    is left out where the model has none. Nothing is changed unless everything fits.

    Args:
        model: The model to load into.
        state_dict: What ``torchvision.models.resnet18(…).state_dict()`` and its like return.

    Returns:
        ``model``.

    Raises:
        TypeError: If the model is no `GatedResNet` or the state dict no mapping.
        ValueError: If names or shapes do not fit the model.
    """
    check_type("model", model, GatedResNet, "a GatedResNet")
    check_type("state_dict", state_dict, Mapping, "a mapping of tensors by name")
    own = model.state_dict()
    given = {name: value for name, value in state_dict.items() if name in own or not name.startswith("fc.")}
    given |= {
        gated: value
        for name, value in given.items()
        if (gated := _NORM.sub(r"\1_gated.", name)) != name and gated in own
    }
    wanted = {name for name in own if not _GATE.search(name)}
    if problems := sorted(wanted ^ given.keys()):
        raise ValueError(f"state_dict must have the model's names, got a difference in {_shorten(problems)}")
    if problems := [name for name in sorted(wanted) if own[name].shape != given[name].shape]:
        name = problems[0]
        raise ValueError(
            f"state_dict must have the model's shapes, {tuple(own[name].shape)} for {name}, got "
            f"{tuple(given[name].shape)}: build the model with the same stem, width and num_classes"
        )
    model.load_state_dict(given, strict=False)
    return model


def to_torchvision_state_dict(model: GatedResNet, branch: Branch = "dense") -> dict[str, Tensor]:
    """Return the weights under torchvision's names, without the gates.

    Args:
        model: The model to read.
        branch: Whose normalisations to take, "dense" or "gated"; the same with ``separate_norm=False``.

    Returns:
        A state dict that torchvision's ResNet of the same depth, stem and classifier loads strictly.

    Raises:
        TypeError: If the model is no `GatedResNet`.
        ValueError: If the branch does not exist.
    """
    check_type("model", model, GatedResNet, "a GatedResNet")
    check_branch(branch)
    own = model.state_dict()
    state_dict = {name: value for name, value in own.items() if not _GATE.search(name) and not _GATED_NORM.search(name)}
    if branch == "gated":
        state_dict |= {_GATED_NORM.sub(r"\1.", name): own[name] for name in own if _GATED_NORM.search(name)}
    return state_dict


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
