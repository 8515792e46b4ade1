"""Configurations refuse what they cannot mean, and survive being written down."""

from pathlib import Path
from typing import Any

import pytest

from gatedkernels.training.config import TrainConfig
from gatedkernels.training.recipes import RECIPES, make_config


def test_round_trip():
    config = TrainConfig(data="imagefolder", data_dir=Path("somewhere"), limit=5, gate_bias=2.0)
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_themselves(recipe: str):
    assert make_config(recipe).recipe == recipe


def test_published_values():
    config = make_config("vicreg-dual")
    assert (config.invariance, config.variance, config.covariance) == (25, 25, 1)
    assert (config.lr, config.trust, config.weight_decay, config.warmup_epochs) == (0.3, 0.02, 1e-4, 10)
    assert (config.epochs, config.batch_size, config.embedding, config.stem_padding) == (500, 256, 2048, 2)
    assert (config.sparsity_weight, config.bound_weight, config.bound_decay) == (5, 1, 0.02)


def test_options_override_a_recipe():
    assert make_config("vicreg-dual-digits", epochs=3).epochs == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget must be above 0 and at most 1, got 0.0"),
        ({"budget": 1.5}, "budget must be above 0"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"limit": 0}, "limit must be positive"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"blur": 2.0}, "blur must be between 0 and 1"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs must be below epochs=5, got 5"),
        ({"data": "mnist"}, "data must be 'digits' or 'cifar10' or 'imagefolder' or 'synthetic', got 'mnist'"),
        ({"precision": "8"}, "precision must be '32' or"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("options", [{"epochs": 2.5}, {"epochs": True}, {"lr": "fast"}, {"data_dir": "a string"}])
def test_wrong_types(options: dict[str, Any]):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
        TrainConfig(**options)


def test_unknown_recipe_lists_the_choices():
    with pytest.raises(
        ValueError, match=r"recipe must be one of vicreg-dual, vicreg-dual-digits, us3l, .*, got 'dino'"
    ):
        make_config("dino")


def test_unknown_option_lists_the_choices():
    with pytest.raises(ValueError, match=r"option must be one of .*epochs.*, got 'epoch'"):
        make_config("vicreg-dual", epoch=3)


@pytest.mark.parametrize("text", ["[]", "{", '{"epoch": 3}', '{"epochs": "3"}'])
def test_damaged_files(text: str):
    with pytest.raises((ValueError, TypeError)):
        TrainConfig.from_json(text)
