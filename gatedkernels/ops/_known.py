"""Calls whose like was checked before.

Checking a call and choosing who serves it takes 40 µs of Python between two convolutions, which leave nothing of the
interpreter in the caches. All that is looked at there is in a call's key: a call with a known key needs no second look.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatedkernels import policy
from gatedkernels.ops._arguments import recorded

_MOST = 4096  # keys of an operation: sizes may change from call to call

Key = tuple[Any, ...]


def unusual(stride: int) -> tuple[int, ...]:
    """A stride as an operator takes it last, whose default is 1: what is left out needs no way to C++."""
    return () if stride == 1 else (stride,)


class KnownCalls:
    """What an operation's compiled CPU operator takes behind the tensors, by shapes, dtypes, devices and options.

    Args:
        operator: Takes the tensors and the numbers that were noted.
    """

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        self._operator = operator
        self._known: dict[Key, tuple[float, ...]] = {}

    def run(self, tensors: tuple[Tensor | None, ...], options: Key) -> Tensor | None:
        """The result of a call whose like is known and that autograd need not know; None where somebody must look."""
        try:
            key = self._key(tensors, options)
            known = None if key is None else self._known.get(key)
        except (AttributeError, TypeError):  # something is no tensor; sizes are symbols, which have no hash
            return None
        return None if known is None or recorded(*tensors) else self._operator(*tensors, *known)

    def note(self, tensors: tuple[Tensor | None, ...], options: Key, *numbers: float) -> None:
        """Remember with which numbers a call was served; its arguments are checked."""
        key = self._key(tensors, options)
        if key is None:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        try:
            self._known[key] = numbers
        except TypeError:
            return

    @staticmethod
    def _key(tensors: tuple[Tensor | None, ...], options: Key) -> Key | None:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        facts = [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        kinds = tuple(map(type, options))  # 1 == 1.0, of which one is refused
        return *facts, tensors[0].stride(), options, kinds, torch.get_num_threads(), policy.version()  # type: ignore[union-attr]
