"""Which implementation serves a call, and up to which density: decided from static facts alone."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedkernels import _extension, thresholds


class Choice(NamedTuple):
    """A backend, and the fraction of kept work above which the operation takes the dense kernel instead."""

    backend: str
    threshold: float


# Shipped heuristics: up to which density the functional CPU kernels, which pack weights at each call, beat the best
# dense call from the same weights. For each kernel rows of (output pixels of the whole batch up to which the row holds,
# density): the fewer pixels use a weight, the less packing it pays. How they were measured: docs/performance-calls.md.
CPU_THRESHOLDS: dict[str, tuple[tuple[float, float], ...]] = {
    "conv_out 3x3": ((64, 0.75), (math.inf, 0.85)),
    "conv_out 1x1": ((256, 0.75), (1024, 0.55), (math.inf, 0.4)),
    "conv_in 3x3": ((16, 0.2), (64, 0.5), (256, 0.55), (math.inf, 0.85)),
    "conv_in 3x3, large": ((256, 0.0), (math.inf, 0.75)),
    "conv_in 1x1": ((128, 0.0), (256, 0.35), (1024, 0.5), (math.inf, 0.7)),
    "gated_block 3x3": ((16, 0.35), (256, 0.55), (math.inf, 0.85)),
    "gated_block 3x3, large": ((256, 0.0), (math.inf, 0.75)),
    # The backward of a convolution; and a block with its backward, which are served by the same.
    "conv_out_backward 3x3": ((16, 0.6), (64, 0.7), (math.inf, 0.75)),
    "conv_out_backward 1x1": ((16, 0.6), (64, 0.7), (math.inf, 0.75)),
    "conv_in_backward 3x3": ((16, 0.5), (64, 0.6), (math.inf, 0.75)),
    "conv_in_backward 1x1": ((16, 0.5), (64, 0.6), (math.inf, 0.75)),
    "gated_block_training 3x3": ((16, 0.5), (math.inf, 1.0)),
}
# Images that are not channels-last, or their results, are converted: no threshold is higher then.
CPU_CONVERTED = {
    "conv_out 3x3": 0.8,
    "conv_out 1x1": 0.15,
    "conv_in 3x3": 0.75,
    "conv_in 1x1": 0.45,
    "gated_block 3x3": 0.7,
    "conv_out_backward 3x3": 0.65,
    "conv_out_backward 1x1": 0.65,
    "conv_in_backward 3x3": 0.65,
    "conv_in_backward 1x1": 0.65,
    "gated_block_training 3x3": 0.65,
}
# Weights that packing fetches from beyond a core's caches.
_LARGE = 1 << 20


# What `gatedkernels.calibrate` measured, by the number of threads, and by GPU; read when it is first asked for.
_measured: dict[int, thresholds.Table] = {}
_measured_on: dict[torch.device, thresholds.Table] = {}
_version = 0


def version() -> int:
    """Changes whenever `choose` may answer in another way than before."""
    return _version


def forget() -> None:
    """Read measured thresholds again."""
    global _version
    _measured.clear()
    _measured_on.clear()
    _version += 1


def measured(threads: int) -> thresholds.Table:
    """The thresholds that were measured on this machine with so many threads."""
    if threads not in _measured:
        _measured[threads] = thresholds.load(threads)
    return _measured[threads]


def measured_on(device: torch.device) -> thresholds.Table:
    """The thresholds that were measured on this GPU."""
    if device not in _measured_on:
        _measured_on[device] = thresholds.load(thresholds.GPU_THREADS, thresholds.gpu(device))
    return _measured_on[device]


def in_effect() -> dict[str, Any]:
    """The thresholds that decide who serves a call, JSON-able: same thresholds, same bits."""
    threads = torch.get_num_threads()
    shipped = {
        name: [[density, None if math.isinf(most) else most] for most, density in rows]
        for name, rows in CPU_THRESHOLDS.items()
    }
    facts = {"threads": threads, "shipped": shipped, "converted": CPU_CONVERTED, "measured": measured(threads)}
    if torch.cuda.is_available():
        facts["gpu"] = measured_on(torch.device("cuda", torch.cuda.current_device()))
    return facts


# Filters, stride, padding, dilation and groups of the convolutions that the CPU kernels serve.
_SERVED = {
    (kernel, stride, padding, (1, 1), 1)
    for kernel, padding in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
    for stride in ((1, 1), (2, 2))
}


def cpu_problem(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why the CPU kernels cannot serve this convolution, or None."""
    kernel = tuple(weight.shape[2:])
    served = (kernel, tuple(stride), tuple(padding), tuple(dilation), groups) in _SERVED
    if served and x.dtype is torch.float32 and x.device.type == "cpu" and _extension.CPU_ERROR is None:
        return None
    if _extension.CPU_ERROR is not None:
        return f"is not available: {_extension.CPU_ERROR}"
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got x on {x.device}"
    if x.dtype != torch.float32:
        return f"computes in torch.float32, got x of {x.dtype}"
    if (kernel, tuple(padding)) not in {((3, 3), (1, 1)), ((1, 1), (0, 0))}:
        return f"serves 3x3 filters with padding 1 and 1x1 with padding 0, got {kernel} with padding {tuple(padding)}"
    if tuple(stride) not in {(1, 1), (2, 2)}:
        return f"serves strides 1 and 2, got {tuple(stride)}"
    return f"serves dilation 1 and groups 1, got dilation {tuple(dilation)} and groups {groups}"


def output_pixels(x: Tensor, stride: Sequence[int]) -> int:
    """Output pixels of the whole batch, where windows are padded by half their size."""
    pixels = x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1])
    if torch.compiler.is_compiling() or not isinstance(pixels, int):
        return 1 << 20  # one graph for batches of any size: take them for large ones
    return pixels


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
    if x.device.type == "cuda":
        return choose_gpu(kernel, x, weight, stride, padding, dilation, groups)
    if cpu_problem(x, weight, stride, padding, dilation, groups) is not None:
        return Choice("dense", 1.0)
    pixels = output_pixels(x, stride)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    table = {} if torch.compiler.is_compiling() else measured(torch.get_num_threads())
    if table:
        kind, channels = thresholds.kind(kernel, weight, channels_last), thresholds.channel_class(weight)
        known = thresholds.find(table, kind, channels, thresholds.pixel_class(pixels))
        if known is not None:
            return Choice("cpu", known)
    name = f"{kernel} {weight.shape[-1]}x{weight.shape[-1]}"
    large = f"{name}, large"
    rows = CPU_THRESHOLDS[large if weight.numel() > _LARGE and large in CPU_THRESHOLDS else name]
    threshold = next(density for most, density in rows if pixels <= most)
    return Choice("cpu", threshold if channels_last else min(threshold, CPU_CONVERTED[name]))


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


# Operations on a GPU that have a side for each density, chosen there by the device; others serve any density or none.
SWITCHED = ("gated_block", "conv_out", "linear_out")


def can_switch(outputs: int) -> bool:
    """Whether a result of so many channels can have two sides: the dense one writes whole steps of channels."""
    return outputs % 16 == 0


def choose_gpu(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Choice:
    """The backend for a call on a GPU: Triton's kernels where they were measured to be faster, dense everywhere else.

    A threshold of 1 says that they are faster at any density, and nobody looks at it; one below, that the device
    compares: see `gatedkernels.ops.ragged.switch`. Nothing is shipped: without a measurement everything is dense. A
    kernel with its backward ("…_training") has the first threshold or none.
    """
    if torch.compiler.is_compiling() or not all(isinstance(size, int) for size in x.shape):
        return _DENSE
    known = (tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups) in _SERVED
    if not known or triton_problem(x) is not None or not x.is_contiguous(memory_format=torch.channels_last):
        return _DENSE
    pixels = output_pixels(x, stride)
    image = pixels // max(x.shape[0], 1)
    rounded = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return _found_on(x.device, kernel, thresholds.gpu_kind(kernel, weight, rounded, image), weight, pixels)


def choose_linear_gpu(
    x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, recorded: bool
) -> Choice:
    """The same for a linear layer with one of these masks, one for each sample; ``recorded``: for its backward too."""
    if torch.compiler.is_compiling() or not all(isinstance(size, int) for size in x.shape):
        return _DENSE
    mask = in_mask if out_mask is None else out_mask
    of_samples = mask is not None and mask.ndim < x.ndim and (in_mask is None or out_mask is None)
    if not of_samples or triton_problem(x) is not None or x.stride(-1) != 1:
        return _DENSE
    kernel = f"linear_{'in' if out_mask is None else 'out'}{'_training' if recorded else ''}"
    rounded = torch.backends.cuda.matmul.fp32_precision == "tf32"
    kind = thresholds.gpu_kind(kernel, weight[:, :, None, None], rounded, math.prod(x.shape[1:-1]))
    return _found_on(x.device, kernel, kind, weight, math.prod(x.shape[:-1]))


_DENSE = Choice("dense", 1.0)


def _found_on(device: torch.device, kernel: str, kind: str, weight: Tensor, pixels: int) -> Choice:
    """What was measured on a GPU for a kind of calls."""
    known = thresholds.find(measured_on(device), kind, thresholds.channel_class(weight), thresholds.pixel_class(pixels))
    threshold = known or 0.0
    serves = threshold >= 1 or (threshold > 0 and kernel in SWITCHED and can_switch(weight.shape[0]))
    return Choice("triton", threshold) if serves else _DENSE


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


def choose_linear(x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None) -> Choice:
    """The backend for a linear layer with these masks; looks at shapes, dtypes and devices, never at values."""
    if linear_problem(x) is not None:
        return Choice("dense", 1.0)
    shared = x.ndim > 2 and all(mask is None or mask.ndim < x.ndim for mask in (in_mask, out_mask))
    table: thresholds.Table = {}
    if torch.compiler.is_compiling() or not all(isinstance(size, int) for size in x.shape):
        tokens, rows = 1 << 20 if shared else 1, 1 << 20  # one graph for all sizes: take them for large ones
    else:
        tokens = math.prod(x.shape[1:-1]) if shared else 1
        rows = math.prod(x.shape[:-1])
        table = measured(torch.get_num_threads())
    both = in_mask is not None and out_mask is not None
    few = tokens <= LINEAR_FEW
    threshold = next(density for most, density in LINEAR_THRESHOLDS if tokens <= most)
    if rows < LINEAR_LEAST or threshold == 0 or (both and few):
        return Choice("dense", 1.0)
    if table and rows > LINEAR_ONE_SAMPLE and not both:  # measured with several samples, each with its mask
        kind = thresholds.kind("linear_in" if out_mask is None else "linear_out", weight, channels_last=True)
        known = thresholds.find(table, kind, thresholds.channel_class(weight), thresholds.pixel_class(tokens))
        if known is not None:
            return Choice("cpu", known)
    if not few and (out_mask is None or rows <= LINEAR_ONE_SAMPLE):
        return Choice("cpu", 1.0)
    if out_mask is None and rows < LINEAR_LEAST_PACKED:
        threshold = min(threshold, 0.3)
    return Choice("cpu", threshold)


def choose_sliced(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """The backend for a convolution with a width for every sample; looks at shapes, dtypes and devices."""
    return "dense" if cpu_problem(x, weight, stride, padding, dilation, groups) is not None else "cpu"


def choose_sliced_linear(x: Tensor) -> str:
    """The backend for a linear layer with a width for every sample."""
    return "dense" if x.ndim == 2 or linear_problem(x) is not None else "cpu"
