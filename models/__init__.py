"""Gated networks that look like the ones people know."""

from gatedkernels.models._registry import create_model, list_models, register_model
from gatedkernels.models.convert import gate
from gatedkernels.models.gated_resnet import GatedResNet, gated_resnet18, gated_resnet34, gated_resnet50
from gatedkernels.models.slimmable_mobilenet import SlimmableMobileNetV2, slimmable_mobilenet_v2
from gatedkernels.models.slimmable_resnet import (
    SlimmableResNet,
    slimmable_resnet18,
    slimmable_resnet34,
    slimmable_resnet50,
)
from gatedkernels.models.slimmable_vit import SlimmableViT, slimmable_vit_small, slimmable_vit_tiny
from gatedkernels.models.torchvision_weights import load_torchvision, to_torchvision_state_dict

__all__ = [
    "GatedResNet",
    "SlimmableMobileNetV2",
    "SlimmableResNet",
    "SlimmableViT",
    "create_model",
    "gate",
    "gated_resnet18",
    "gated_resnet34",
    "gated_resnet50",
    "list_models",
    "load_torchvision",
    "register_model",
    "slimmable_mobilenet_v2",
    "slimmable_resnet18",
    "slimmable_resnet34",
    "slimmable_resnet50",
    "slimmable_vit_small",
    "slimmable_vit_tiny",
    "to_torchvision_state_dict",
]
