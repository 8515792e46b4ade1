"""Complete runs by name, and the networks that belong to them.

The one place where training meets the models: a method receives its backbone from here.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gatedkernels.models import GatedResNet, create_model, gated_resnet18
from gatedkernels.nn import ConvCost, SlimmableNetwork, gated_flops, set_width
from gatedkernels.training.config import RunConfig, SlimmableConfig, TrainConfig, US3LConfig, USNetConfig
from gatedkernels.training.errors import RunError, TrainingError
from gatedkernels.training.seeds import derived_seed

if TYPE_CHECKING:
    from gatedkernels.training.methods import US3L, USNet, VICRegDual

Backbone = GatedResNet
SlimmableBackbone = SlimmableNetwork

# VICReg-Dual-Gating in minutes on two cores: a narrower network, its own schedule, handwritten digits. It takes 880
# steps where the paper takes 97,000. So gates start open and rest for the first quarter, until the dense branch has
# something to teach; the sparsity loss weighs twenty times as much, which is what brings so short a run to its budget;
# and the bound is released fifteen times as fast.
_DIGITS = {
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
}

# Without US3L's momentum targets for narrow networks, auxiliary head, dynamic sampling and group regularisation.
_PLAIN = {"auxiliary_head": False, "distill_momentum": False, "dynamic_sampling": False, "group_strength": 0.0}
# One network of one width.
_ALONE = {**_PLAIN, "fixed_width": 1.0, "distill": "none"}
_SIMCLR = {"base": "relative", "base_momentum": False}
_SIMSIAM = {"base": "absolute", "base_momentum": False, "embedding": 2048, "lr": 0.05, "weight_decay": 5e-4}
_BYOL = {**_SIMSIAM, "base_momentum": True}
_MOCO_V2 = {"base": "queue", "ema": 0.999, "temperature": 0.2, "lr": 0.3, "batch_size": 256}
# Published for vision transformers, below; with SGD it takes BYOL's rate and decay.
_MOCO_V3 = {"base": "keys", "temperature": 0.2, "lr": 0.05, "weight_decay": 5e-4}
_SEED = {**_SIMSIAM, "base": "similarities", "base_momentum": True, "queue": 32768, "weight_decay": 1e-4, "epochs": 200}
# As US3L's authors train vision transformers, after MoCo v3.
_VIT = {
    **_MOCO_V3,
    "network": "vit_tiny",
    "image_size": 224,
    "optimizer": "adamw",
    "lr": 3e-4,
    "weight_decay": 0.1,
    "epochs": 300,
    "warmup_epochs": 40,
    "ema_end": 1.0,
    "group_strength": 0.0,
}

RECIPES: dict[str, tuple[type[RunConfig], Mapping[str, Any]]] = {
    # As the paper has it for CIFAR-10: 500 epochs of full-width ResNet-18 in batches of 256.
    "vicreg-dual": (TrainConfig, {}),
    "vicreg-dual-digits": (TrainConfig, _DIGITS),
    # As the authors' code has it for ResNet-18 on CIFAR: 400 epochs in batches of 512.
    "us3l": (US3LConfig, {}),
    "simclr": (US3LConfig, {**_ALONE, **_SIMCLR}),
    "simsiam": (US3LConfig, {**_ALONE, **_SIMSIAM}),
    "byol": (US3LConfig, {**_ALONE, **_BYOL}),
    "moco-v2": (US3LConfig, {**_ALONE, **_MOCO_V2}),
    "moco-v3": (US3LConfig, {**_ALONE, **_MOCO_V3}),
    # One network of one width, drawn to a frozen teacher: teacher_run.
    "seed": (US3LConfig, {**_ALONE, **_SEED}),
    "seed-mse": (US3LConfig, {**_ALONE, **_BYOL}),
    # Universally slimmable, with narrow networks drawn to the widest of the iteration.
    "us-simclr": (US3LConfig, {**_PLAIN, **_SIMCLR, "distill": "relative"}),
    "us-simsiam": (US3LConfig, {**_PLAIN, **_SIMSIAM, "distill": "absolute"}),
    "us-byol": (US3LConfig, {**_PLAIN, **_BYOL, "distill": "absolute"}),
    "us-moco-v3": (US3LConfig, {**_PLAIN, **_MOCO_V3, "distill": "keys"}),
    # Vision transformers: --network vit_small for the larger one.
    "us3l-vit": (US3LConfig, {**_VIT, "distill": "keys"}),
    "moco-v3-vit": (US3LConfig, {**_VIT, **_ALONE}),
    "us-moco-v3-vit": (US3LConfig, {**_VIT, **_PLAIN, "distill": "keys"}),
    # With labels, many widths at once or one: fixed_width.
    "us-net": (USNetConfig, {}),
}


def make_config(recipe: str, **options: Any) -> RunConfig:
    """Build the configuration of a recipe with some options changed.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If the recipe or an option is unknown, or a value is out of range; the message lists the choices.
    """
    kind, values = _recipe(recipe)
    kind.check_names(options)
    return kind(**{"recipe": recipe, **values, **options})


def config_from_json(text: str) -> RunConfig:
    """Read the configuration of any run back.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If the text is no JSON object, or a recipe, a field or a value is unknown or wrong.
    """
    values = json.loads(text)
    recipe = values.get("recipe") if isinstance(values, dict) else None
    return (TrainConfig if recipe is None else _recipe(recipe)[0]).from_json(text)


def _recipe(name: str) -> tuple[type[RunConfig], Mapping[str, Any]]:
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def build_backbone(config: TrainConfig) -> Backbone:
    """Build the gated network of a run as it is before training; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("weights", config.seed))
        return gated_resnet18(
            num_classes=None,
            stem=config.stem,
            stem_padding=config.stem_padding,
            width=config.width,
            group=config.gate_group,
            gate_bias=config.gate_bias,
            codebook=config.gate_codebook,
        )


def build_slimmable(config: SlimmableConfig, *, track_running_stats: bool = False) -> SlimmableNetwork:
    """Build the slimmable network of a run as it is before training; the same for the same seed.

    Args:
        config: The run.
        track_running_stats: Whether its batch normalisations have statistics: in evaluation, not in training.
    """
    options: dict[str, Any] = {"stem": config.stem, "track_running_stats": track_running_stats}
    if config.network.startswith("vit"):
        options = {"image_size": config.image_size, "patch_size": config.patch_size}
    elif config.network.startswith("resnet"):
        options |= {"stem_padding": config.stem_padding, "channels": round(64 * config.width)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("weights", config.seed))
        net = create_model(f"slimmable_{config.network}", num_classes=None, **options)
    assert isinstance(net, SlimmableNetwork)
    net.set_width(config.fixed_width or 1.0)
    return net


def backbone_costs(backbone: nn.Module, config: RunConfig) -> list[ConvCost]:
    """Count what the backbone's layers cost for one image of the run's size."""
    device = next(backbone.parameters()).device
    return gated_flops(backbone, torch.zeros(1, 3, config.image_size, config.image_size, device=device))


def build_method(config: RunConfig, num_classes: int | None = None) -> "VICRegDual | US3L | USNet":
    """Build the method of a run, backbone and heads drawn from its seed.

    Args:
        config: The run.
        num_classes: Classes of the images, for a run with labels.

    Raises:
        RunError: If the frozen teacher's run cannot be read, or is none of a slimmable network.
        TrainingError: If a frozen teacher is missing or its embeddings are of another width.
        ValueError: If no network has the widths that are asked for.
    """
    from gatedkernels.training.methods import US3L, USNet, VICRegDual

    if isinstance(config, USNetConfig):
        if num_classes is None:
            raise ValueError(f"num_classes must be the number of classes for {config.recipe}, got None")
        labelled = build_slimmable(config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed("heads", config.seed))
            return USNet(labelled, config, num_classes)
    if isinstance(config, US3LConfig):
        slimmable, teacher = build_slimmable(config), _frozen_teacher(config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed("heads", config.seed))
            return US3L(slimmable, config, teacher)
    assert isinstance(config, TrainConfig)
    backbone = build_backbone(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("expander", config.seed))
        return VICRegDual(backbone, backbone_costs(backbone, config), config)


def _frozen_teacher(config: US3LConfig) -> tuple[nn.Module, nn.Module] | None:
    """Load backbone and head of the run that is to teach."""
    from gatedkernels.training.heads import projector
    from gatedkernels.training.run_folder import RunFolder

    path = config.teacher_run
    if path is None:
        if config.recipe.startswith("seed") or config.base == "similarities":
            raise TrainingError(f"teacher_run must be the folder of a run, whose network {config.recipe} learns from")
        return None
    folder = RunFolder(path)
    taught = folder.read_config()
    if not isinstance(taught, US3LConfig):
        raise RunError(
            f"teacher_run must be a run of a slimmable network, without labels, got {taught.recipe} in {path}"
        )
    if taught.embedding != config.embedding:
        raise TrainingError(f"embedding must be {taught.embedding} as the teacher's, got {config.embedding}")
    backbone = build_slimmable(taught)
    head = projector(backbone, taught)
    set_width(head, taught.fixed_width or 1.0)
    state = folder.check_checkpoint()["state_dict"]
    for name, module in (("backbone.", backbone), ("head.", head)):
        own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise RunError(f"{folder.checkpoint_file} must fit {folder.config_file}: {error}") from error
    return backbone, head
