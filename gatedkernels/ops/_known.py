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


class KnownCalls:
    """Thresholds and strides for an operation's compiled CPU operator, by shapes, dtypes, devices and options.

    Args:
        operator: Takes the tensors, a threshold and a stride, which is 1 where it is left out.
    """

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        self._operator = operator
        self._known: dict[Key, tuple[float] | tuple[float, int]] = {}

    def run(self, tensors: tuple[Tensor | None, ...], options: Key) -> Tensor | None:
        """The result of a call whose like is known and that autograd need not know; None where somebody must look."""
        try:
            key = self._key(tensors, options)
            known = None if key is None else self._known.get(key)
        except (AttributeError, TypeError):  # something is no tensor; sizes are symbols, which have no hash
            return None
        return None if known is None or recorded(*tensors) else self._operator(*tensors, *known)

    def note(self, tensors: tuple[Tensor | None, ...], options: Key, threshold: float, stride: int) -> None:
        """Remember how a call was served; its arguments are checked."""
        key = self._key(tensors, options)
        if key is None:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        try:
            # A number that is handed over takes 0.3 µs on its way to C++.
            self._known[key] = (threshold,) if stride == 1 else (threshold, stride)
        except TypeError:
            return

    @staticmethod
    def _key(tensors: tuple[Tensor | None, ...], options: Key) -> Key | None:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        facts = [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        kinds = tuple(map(type, options))  # 1 == 1.0, of which one is refused
        return *facts, tensors[0].stride(), options, kinds, torch.get_num_threads(), policy.version()  # type: ignore[union-attr]
