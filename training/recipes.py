"""Complete runs by name, and the networks that belong to them.

The one place where training meets the models: a method receives its backbone from here.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gatedkernels.models import GatedResNet, gated_resnet18
from gatedkernels.nn import ConvCost, gated_flops
from gatedkernels.training.config import TrainConfig, check_names
from gatedkernels.training.seeds import derived_seed

if TYPE_CHECKING:
    from gatedkernels.training.methods import VICRegDual

Backbone = GatedResNet


def vicreg_dual(**options: Any) -> TrainConfig:
    """VICReg-Dual-Gating as the paper has it for CIFAR-10: 500 epochs of full-width ResNet-18 in batches of 256."""
    return TrainConfig(**{"recipe": "vicreg-dual", **options})


def vicreg_dual_digits(**options: Any) -> TrainConfig:
    """The same method in minutes on two cores: a narrower network, its own schedule, handwritten digits.

    It takes 880 steps where the paper takes 97,000. So gates start open and rest for the first quarter, until the dense
    branch has something to teach; the sparsity loss weighs twenty times as much, which is what brings so short a run to
    its budget; and the bound is released fifteen times as fast.
    """
    chosen: dict[str, Any] = {
        "recipe": "vicreg-dual-digits",
        "data": "digits",
        "width": 0.125,
        "stem_padding": 1,
        "embedding": 1024,
        "budget": 0.32,
        "gate_bias": 2.0,
        "gate_warmup_epochs": 10,
        "sparsity_weight": 100.0,
        "bound_decay": 0.3,
        "epochs": 40,
        "batch_size": 64,
        "lr": 0.2,
        "warmup_epochs": 2,
        **options,
    }
    return TrainConfig(**chosen)


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "vicreg-dual": vicreg_dual,
    "vicreg-dual-digits": vicreg_dual_digits,
}


def make_config(recipe: str, **options: Any) -> TrainConfig:
    """Build the configuration of a recipe with some options changed.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If the recipe or an option is unknown, or a value is out of range; the message lists the choices.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    check_names(options)
    return RECIPES[recipe](**options)


def build_backbone(config: TrainConfig) -> Backbone:
    """Build the network of a run as it is before training; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("weights", config.seed))
        return gated_resnet18(
            num_classes=None,
            stem=config.stem,
            stem_padding=config.stem_padding,
            width=config.width,
            group=config.gate_group,
            gate_bias=config.gate_bias,
        )


def backbone_costs(backbone: Backbone, config: TrainConfig) -> list[ConvCost]:
    """Count what the backbone's layers cost for one image of the run's size."""
    device = next(backbone.parameters()).device
    return gated_flops(backbone, torch.zeros(1, 3, config.image_size, config.image_size, device=device))


def build_method(config: TrainConfig) -> "VICRegDual":
    """Build the method of a run, backbone and expander drawn from its seed."""
    from gatedkernels.training.methods import VICRegDual

    backbone = build_backbone(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("expander", config.seed))
        return VICRegDual(backbone, backbone_costs(backbone, config), config)
