"""Which implementation serves a call: the explicit choice or an error that lists what there is."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from gatedkernels import _extension, policy

Backend = Literal["auto", "reference", "dense", "cpu", "triton", "cuda"]

ALWAYS = 2.0  # a threshold that no density exceeds: an explicit backend never falls back


def require(backend: str, launchers: Mapping[str, object], x: Tensor) -> None:
    """Raise ``ValueError`` unless ``backend`` exists for this operation, on this machine, for the device of ``x``."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend not in launchers:
        raise ValueError(f"backend must be one of auto, {', '.join(launchers)} for this operation, got {backend!r}")
    if backend == "cpu":
        if _extension.CPU_ERROR is not None:
            raise ValueError(f"backend 'cpu' is not available: {_extension.CPU_ERROR}")
        if x.device.type != "cpu":
            raise ValueError(f"backend 'cpu' needs tensors on the CPU, got x on {x.device}")
    if backend == "triton":
        refuse("triton", policy.triton_problem(x))
    if backend == "cuda":
        if _extension.CUDA_ERROR is not None:
            raise ValueError(f"backend 'cuda' is not available: {_extension.CUDA_ERROR}")
        if x.device.type != "cuda":
            raise ValueError(f"backend 'cuda' needs tensors on a CUDA device, got x on {x.device}")


def refuse(backend: str, problem: str | None) -> None:
    """Raise ``ValueError`` if a backend has a problem with a call, in the words of `policy`."""
    if problem:
        raise ValueError(f"backend {backend!r} {problem}")


def too_dense(threshold: float, *masks: Tensor | None) -> bool:
    """Whether more of the work is left than that, so that the dense kernel is the faster one.

    What is left is the product of the masks' densities. On the CPU, where looking is free: elsewhere nothing is too
    dense.
    """
    given = [mask for mask in masks if mask is not None]
    if threshold >= 1 or not given or given[0].device.type != "cpu":
        return False
    return math.prod(int(mask.sum()) for mask in given) > threshold * math.prod(mask.numel() for mask in given)


def cpu_or_reference(
    backend: str,
    launchers: Mapping[str, object],
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str:
    """The backend of an operation on packed channels, which has no dense form: "auto" is the CPU kernel if it can."""
    if backend == "auto":
        return "reference" if policy.cpu_problem(x, weight, stride, padding, dilation, 1) else "cpu"
    require(backend, launchers, x)
    return backend
