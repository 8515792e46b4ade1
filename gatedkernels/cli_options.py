"""The options of ``gatedkernels train``, one for every field of every configuration."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from gatedkernels.training.config import CONFIGS, OPTIONS
from gatedkernels.training.recipes import RECIPES


def option(name: str) -> str:
    """An option as a user types it."""
    return f"--{name.replace('_', '-')}"


def as_typed(message: str) -> str:
    """A message about arguments as one about options."""
    names = "|".join(["run_dir", *OPTIONS])
    return re.sub(rf"(?<![\w/.-])({names})(?= must |=)", lambda found: option(found[0]), message)


def problem_of(recipe: str, given: Mapping[str, Any], unknown: Sequence[str]) -> str | None:
    """Why these options are none of a recipe's, or None.

    Args:
        recipe: The recipe, or what was typed in its place.
        given: Options with values, by field.
        unknown: Words that nobody knows.
    """
    if unknown:
        return f"{unknown[0]} is none of the options --run-dir, --resume, {', '.join(map(option, OPTIONS))}"
    if recipe not in RECIPES:
        return None  # which is said elsewhere
    known = {item.name for item in fields(RECIPES[recipe][0])}
    others = [name for name in given if name not in known]
    if not others:
        return None
    its = ", ".join(option(name) for name in OPTIONS if name in known)
    return f"{option(others[0])} is no option of {recipe}, whose options are {its}"


def declare_options() -> inspect.Signature:
    """Give ``train`` an option for every field of every configuration, none of them set."""
    recipe = typer.Argument(help="What to run; the list stands above.", show_default=False)
    run_dir = typer.Option(help="Folder of the run; new, unless the run is resumed.", show_default=False)
    resume = typer.Option("--resume", help="Continue after the last finished epoch.")
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("recipe", kind, annotation=Annotated[str, recipe]),
        inspect.Parameter("run_dir", kind, annotation=Annotated[Path, run_dir]),
        inspect.Parameter("resume", kind, default=False, annotation=Annotated[bool, resume]),
    ]
    types = {
        name: hint for each in reversed(CONFIGS) for name, hint in get_type_hints(each, include_extras=True).items()
    }
    for name in OPTIONS:
        annotation, text = get_args(types[name])
        declared = typer.Option(help=f"{text} Default: {_defaults(name)}.", show_default=False)
        annotation = Annotated[annotation | None, declared]
        parameters.append(inspect.Parameter(name, kind, default=None, annotation=annotation))
    return inspect.Signature(parameters)


def _defaults(name: str) -> str:
    """Say what an option is in the recipes that have the defaults of their configuration, once where all agree."""
    recipes: dict[str, list[str]] = {}
    for config in CONFIGS:
        values = {item.name: item.default for item in fields(config)}
        if name in values:
            recipes.setdefault(_in_words(values[name]), []).append(str(values["recipe"]))
    if list(map(len, recipes.values())) == [len(CONFIGS)]:
        return next(iter(recipes))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in recipes.items())


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
