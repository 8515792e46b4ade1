"""Gated networks that look like the ones people know."""

from gatedkernels.models._registry import create_model, list_models, register_model
from gatedkernels.models.convert import gate
from gatedkernels.models.gated_resnet import GatedResNet, gated_resnet18, gated_resnet34, gated_resnet50
from gatedkernels.models.torchvision_weights import load_torchvision, to_torchvision_state_dict

__all__ = [
    "GatedResNet",
    "create_model",
    "gate",
    "gated_resnet18",
    "gated_resnet34",
    "gated_resnet50",
    "list_models",
    "load_torchvision",
    "register_model",
    "to_torchvision_state_dict",
]
