"""docs/recipes.md says what there is: every recipe, and each case of US3L's ablation as a line that means it."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gatedkernels.training.config import US3LConfig
from gatedkernels.training.recipes import RECIPES, make_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
ROWS = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.read_text().splitlines() if "|" in line]
CASES = {int(row[0]): row[1:] for row in ROWS if row[0].isdecimal()}


def configured(command: str) -> US3LConfig:
    """The configuration of a command line as the page has them."""
    words = shlex.split(command.strip("`"))
    assert words[:2] == ["gatedkernels", "train"]
    options: dict[str, Any] = {}
    rest = words[3:]
    while rest:
        name = rest.pop(0).removeprefix("--").replace("-", "_")
        options[name] = rest.pop(0) if rest and not rest[0].startswith("--") else True
    config = make_config(words[2], **options)
    assert isinstance(config, US3LConfig)
    return config


def test_every_recipe_is_there():
    described = {name.strip(" `") for row in ROWS for name in row[0].split(",")}
    assert set(RECIPES) <= described


@pytest.mark.parametrize("case", CASES)
def test_a_case_means_what_its_columns_say(case: int):
    base, distill, auxiliary, momentum, command = CASES[case]
    config = configured(command)
    assert (config.base, config.distill) == (base, distill)
    assert config.auxiliary_head == (auxiliary == "yes")
    assert [config.base_momentum, config.distill_momentum] == [each == "yes" for each in momentum.split(", ")]
    assert not config.dynamic_sampling and config.group_strength == 0
    assert (config.lr, config.weight_decay) == ((0.05, 5e-4) if base == "absolute" else (0.5, 1e-4))


def test_there_are_seventeen():
    assert list(CASES) == list(range(1, 18))
    assert len({tuple(row[:4]) for row in CASES.values()}) == 17


def test_case_13_is_the_final_recipe_without_its_schedules():
    final = make_config("us3l", dynamic_sampling=False, group_strength=0.0)
    assert {**asdict(configured(CASES[13][-1])), "recipe": "us3l"} == asdict(final)
