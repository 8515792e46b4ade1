"""Which implementation serves a call, and up to which density: decided from static facts alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gatedkernels import _extension


class Choice(NamedTuple):
    """A backend, and the fraction of kept work above which the operation takes the dense kernel instead."""

    backend: str
    threshold: float


# Shipped heuristics: the kept fraction at which the functional CPU kernels, weights packed per call, stop paying
# against the best dense call from the same weights (docs/performance.md tells how they were measured).
CPU_THRESHOLDS = {"gated_conv2d": 0.6, "gated_block": 0.8}


def cpu_problem(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why the CPU kernels cannot serve this convolution, or None."""
    if _extension.CPU_ERROR is not None:
        return f"is not available: {_extension.CPU_ERROR}"
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got x on {x.device}"
    if x.dtype != torch.float32:
        return f"computes in torch.float32, got x of {x.dtype}"
    kernel = tuple(weight.shape[2:])
    if (kernel, tuple(padding)) not in {((3, 3), (1, 1)), ((1, 1), (0, 0))}:
        return f"serves 3x3 filters with padding 1 and 1x1 with padding 0, got {kernel} with padding {tuple(padding)}"
    if tuple(stride) not in {(1, 1), (2, 2)}:
        return f"serves strides 1 and 2, got {tuple(stride)}"
    if tuple(dilation) != (1, 1) or groups != 1:
        return f"serves dilation 1 and groups 1, got dilation {tuple(dilation)} and groups {groups}"
    return None


def choose(
    operation: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Choice:
    """The backend for this call of ``operation``; looks at shapes, dtypes and devices, never at values."""
    if operation in CPU_THRESHOLDS and cpu_problem(x, weight, stride, padding, dilation, groups) is None:
        return Choice("cpu", CPU_THRESHOLDS[operation])
    return Choice("dense", 1.0)
