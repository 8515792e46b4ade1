"""What everybody asks of arguments that are no tensors; `gatedkernels.ops._arguments` asks of those that are."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

from torch.nn import Module


def check_type(name: str, value: object, kind: Any, words: str) -> None:
    """Raise ``TypeError`` unless a value is of a type, which the message has in these words."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, got {type(value).__name__}")


def check_module(name: str, value: object) -> None:
    """Raise ``TypeError`` unless a value is a module."""
    check_type(name, value, Module, "a torch.nn.Module")


def check_int(name: str, value: object, at_least: int | None = 1, *, optional: bool = False) -> None:
    """Raise ``TypeError`` unless a value is a whole number, and ``ValueError`` if it is too small.

    Args:
        name: The argument's name, for the message.
        value: The value to look at; NumPy's whole numbers are some too.
        at_least: The smallest that is accepted; None: any.
        optional: Whether None is accepted.
    """
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{or_none}, got {value!r}")
    if at_least is not None and int(value) < at_least:
        bound = "positive" if at_least == 1 else f"at least {at_least}"
        raise ValueError(f"{name} must be {bound}{or_none}, got {value}")


def check_sequence(name: str, values: object, word: str, length: int | None = None) -> None:
    """Refuse what is no sequence, or an empty one.

    Args:
        name: The argument's name, for the message.
        values: What should be a sequence, and no string; its values are looked at by others.
        word: What each of its values is, for the message.
        length: How many it should hold; None: any number but none.

    Raises:
        TypeError: If it is something else.
        ValueError: If it holds another number of values.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        several = f"{word}s" if length is None else f"{length} {word}s"
        raise TypeError(f"{name} must be a sequence of {several}, got {values!r}")
    if length is not None and len(values) != length:
        raise ValueError(f"{name} must hold {length} {word}s, got {values!r}")
    if not values:
        raise ValueError(f"{name} must hold at least one {word}, got none")


def check_sizes(**sizes: object) -> None:
    """Raise as `check_int` does unless all of these are positive whole numbers."""
    for name, value in sizes.items():
        check_int(name, value)


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> None:
    """Raise ``TypeError`` unless a value is a number, and ``ValueError`` if it is out of range or not a number at all.

    Args:
        name: The argument's name, for the message.
        value: The value to look at.
        above: A bound that is not accepted itself.
        at_least: A bound that is.
        at_most: The largest that is accepted.
        optional: Whether None is accepted.
    """
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{or_none}, got {value!r}")
    number = float(value)
    fits = (above is None or number > above) and (at_least is None or number >= at_least)
    if fits and number == number and (at_most is None or number <= at_most):  # not a number differs from itself
        return
    raise ValueError(f"{name} must {_range(above, at_least, at_most)}{or_none}, got {value}")


def _range(above: float | None, at_least: float | None, at_most: float | None) -> str:
    if at_most is not None:
        return f"lie in {'[' if above is None else '('}{at_least if above is None else above}, {at_most}]"
    if above is not None:
        return f"exceed {above}" if above else "be positive"
    return "be a number" if at_least is None else f"be at least {at_least}"


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ``ValueError`` unless an option is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
