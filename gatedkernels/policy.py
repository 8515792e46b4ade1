"""Which implementation serves a call, and up to which density: decided from static facts alone."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gatedkernels import _extension


class Choice(NamedTuple):
    """A backend, and the fraction of kept work above which the operation takes the dense kernel instead."""

    backend: str
    threshold: float


# Shipped heuristics: up to which density the functional CPU kernels, which pack weights at each call, beat the best
# dense call from the same weights. For each kernel rows of (output pixels of the whole batch up to which the row holds,
# density): the fewer pixels use a weight, the less packing it pays. docs/performance.md tells how they were measured.
CPU_THRESHOLDS: dict[str, tuple[tuple[float, float], ...]] = {
    "conv_out": ((16, 0.45), (64, 0.5), (1024, 0.75), (math.inf, 0.8)),
    "conv_in": ((16, 0.0), (64, 0.2), (256, 0.3), (1024, 0.6), (math.inf, 0.75)),
    "gated_block": ((16, 0.0), (64, 0.25), (256, 0.4), (1024, 0.7), (math.inf, 0.8)),
}
# Other layouts than channels-last are converted first.
CPU_CONVERTED_THRESHOLD = 0.65


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
    kernel: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Choice:
    """The backend for this call of a kernel; looks at shapes, strides, dtypes and devices, never at values."""
    if cpu_problem(x, weight, stride, padding, dilation, groups) is not None:
        return Choice("dense", 1.0)
    pixels = x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1])
    if torch.compiler.is_compiling() or not isinstance(pixels, int):
        pixels = 1 << 20  # one graph for batches of any size: take them for large ones
    threshold = next(density for most, density in CPU_THRESHOLDS[kernel] if pixels <= most)
    if kernel != "conv_in" and not x.is_contiguous(memory_format=torch.channels_last):
        threshold = min(threshold, CPU_CONVERTED_THRESHOLD)
    return Choice("cpu", threshold)


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_problem(x: Tensor) -> str | None:
    """Why the Triton kernels cannot serve images or tokens like these, or None."""
    if importlib.util.find_spec("triton") is None:
        return "is not available: the package triton is not installed"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"needs tensors on a CUDA device, got x on {x.device}"
    if x.dtype not in TRITON_DTYPES:
        return f"computes in {', '.join(map(str, TRITON_DTYPES))}, got x of {x.dtype}"
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "cannot compute in torch.bfloat16 on the CPU: Triton's interpreter multiplies the bits as integers"
    return None


# The same for linear layers: rows of (tokens of one mask up to which the row holds, part of the work). For one token
# the list of its open units costs what it saves.
LINEAR_THRESHOLDS = ((1, 0.0), (3, 0.3), (24, 0.5), (48, 0.6), (128, 0.8), (math.inf, 0.9))
# Up to so many tokens of one mask an output is a dot product with a row of weights as it lies: a mask of inputs saves
# nothing there, and gathering for the weights' gradient costs more than it saves.
LINEAR_FEW = 24
# Tokens in all: below the first number the call itself costs what it saves; below the second, packing for inputs does;
# up to the third, looking at the density and selecting afterwards costs more than the kernel loses.
LINEAR_LEAST, LINEAR_LEAST_PACKED, LINEAR_ONE_SAMPLE = 16, 128, 256
# The weights' gradient gathers the channels of every sample: it pays up to this part of the work.
LINEAR_BACKWARD = 0.75


def linear_problem(x: Tensor) -> str | None:
    """Why the CPU kernels cannot serve this linear layer, or None."""
    if _extension.CPU_ERROR is not None:
        return f"is not available: {_extension.CPU_ERROR}"
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got x on {x.device}"
    if x.dtype != torch.float32:
        return f"computes in torch.float32, got x of {x.dtype}"
    return None


def choose_linear(x: Tensor, in_mask: Tensor | None, out_mask: Tensor | None) -> Choice:
    """The backend for a linear layer with these masks; looks at shapes, dtypes and devices, never at values."""
    if linear_problem(x) is not None:
        return Choice("dense", 1.0)
    shared = x.ndim > 2 and all(mask is None or mask.ndim < x.ndim for mask in (in_mask, out_mask))
    if torch.compiler.is_compiling() or not all(isinstance(size, int) for size in x.shape):
        tokens, rows = 1 << 20 if shared else 1, 1 << 20  # one graph for all sizes: take them for large ones
    else:
        tokens = math.prod(x.shape[1:-1]) if shared else 1
        rows = math.prod(x.shape[:-1])
    both = in_mask is not None and out_mask is not None
    few = tokens <= LINEAR_FEW
    threshold = next(density for most, density in LINEAR_THRESHOLDS if tokens <= most)
    if rows < LINEAR_LEAST or threshold == 0 or (both and few):
        return Choice("dense", 1.0)
    if not few and (out_mask is None or rows <= LINEAR_ONE_SAMPLE):
        return Choice("cpu", 1.0)
    if out_mask is None and rows < LINEAR_LEAST_PACKED:
        threshold = min(threshold, 0.3)
    return Choice("cpu", threshold)
