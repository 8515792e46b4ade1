"""Constructors of models, by name."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from gatedkernels._checks import check_type

_Constructor = TypeVar("_Constructor", bound=Callable[..., nn.Module])
_CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {}


def register_model(constructor: _Constructor) -> _Constructor:
    """Register a constructor under its own name.

    Raises:
        TypeError: If the constructor is no function.
        ValueError: If the name is taken.
    """
    check_type("constructor", constructor, FunctionType, "a function")
    name = constructor.__name__
    if name in _CONSTRUCTORS:
        raise ValueError(f"constructor must have a name of its own, got {name!r} again")
    _CONSTRUCTORS[name] = constructor
    return constructor


def list_models() -> list[str]:
    """List the names of the registered models, sorted."""
    return sorted(_CONSTRUCTORS)


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name; the options are its constructor's.

    Raises:
        TypeError: If the name is no string.
        ValueError: If no model has this name.
    """
    check_type("name", name, str, "a string")
    if name not in _CONSTRUCTORS:
        raise ValueError(f"name must be one of {', '.join(list_models())}, got {name!r}")
    return _CONSTRUCTORS[name](**options)
