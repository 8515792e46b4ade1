"""Measure up to which density gated kernels beat the dense way, on this machine."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gatedkernels import _extension, policy, thresholds
from gatedkernels._checks import check_int, check_number, check_sequence, check_sizes
from gatedkernels.ops._backends import ALWAYS
from gatedkernels.reporting.timing import Timing, interleave, use_threads

LINEAR = ("linear_out", "linear_in")
KERNELS = (
    *(("conv_out", 3), ("conv_in", 3), ("gated_block", 3), ("conv_out", 1), ("conv_in", 1)),
    *((kernel, 1) for kernel in LINEAR),
)
CHANNELS = (64, 128, 256, 512)
PIXELS = (16, 64, 256, 1024, 4096, 16384)

_DENSITIES = (0.25, 0.5, 0.75, 1.0)
_NEVER = -1.0  # a threshold that every density exceeds
_MARGIN = 0.98  # a kernel serves where it is faster by more than what a median errs
_NEARLY_ALL = 0.99
_REPEATS = 2  # with other memory, which decides much; the more careful threshold counts
_SAMPLES = 16  # of a linear layer's calls
_MOST_MACS = 1 << 32  # classes of larger images take the threshold of the next smaller one


Call = Callable[[float, float], Callable[[], Tensor]]  # for a density of its mask, and a threshold


class Case(NamedTuple):
    """A class of calls. A linear layer has, in the place of a batch's pixels, tokens of one sample, and one layout."""

    kernel: str
    side: int
    channels: int
    pixels: int
    channels_last: bool

    @property
    def multiply_adds(self) -> int:
        """Of the dense way."""
        return self.channels**2 * self.side**2 * self.pixels * (_SAMPLES if self.kernel in LINEAR else 1)

    def weight(self) -> Tensor:
        """Of its form."""
        form = () if self.kernel in LINEAR else (self.side, self.side)
        return torch.empty(self.channels, self.channels, *form)


def cases(channels: Sequence[int] = CHANNELS, pixels: Sequence[int] = PIXELS) -> list[Case]:
    """The classes to measure, but for those that take very long."""
    return [
        case
        for kernel, side in KERNELS
        for c in channels
        for p in pixels
        for channels_last in ((True,) if kernel in LINEAR else (True, False))
        if (case := Case(kernel, side, c, p, channels_last)).multiply_adds <= _MOST_MACS
    ]


def calibrate(
    *,
    channels: Sequence[int] | None = None,
    pixels: Sequence[int] | None = None,
    threads: int | None = None,
    seconds: float = 0.2,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> thresholds.Table:
    """Measure thresholds of the functional operations, store them, and use them from now on.

    A threshold is the density of a mask above which ``backend="auto"`` takes PyTorch's dense convolution. Those of CPUs
    that are shipped come from one machine; these come from yours, for its instruction set, number of threads and
    versions. For GPUs none are shipped, and "auto" is dense there until they are measured. Nothing is ever measured but
    here. They lie in ``thresholds.json``, in the folder that ``GATEDKERNELS_CACHE`` names, else in
    ``gatedkernels`` in the user's cache (``XDG_CACHE_HOME``), and are merged with what is there.

    Args:
        channels: Input and output channels of the layers, positive; None: 64 to 512.
        pixels: Output pixels of a whole batch, positive, and on a CPU tokens of each sample of a linear layer; None: 16
            to 16384 on a CPU, 1024 to 262144 on a GPU.
        threads: Threads to measure with, and to measure for, on a CPU; None: PyTorch's setting.
        seconds: How long to measure each class, about; there are some two hundred on a CPU, two thousand on a GPU.
        device: A CPU or a CUDA device: whose kernels.
        progress: Called with a line for each class.

    Returns:
        The measured thresholds, by kind of call, class of channels and class of pixels.

    Raises:
        RuntimeError: If there are no kernels for the device, or no such device.
        OSError: If the folder cannot be written.
        TypeError: If an argument is none of these.
        ValueError: If an argument is not positive, the device is neither a CPU nor a CUDA device, or a newer
            gatedkernels wrote the file.
    """
    for name, values in (("channels", channels), ("pixels", pixels)):
        if values is not None:
            check_sequence(name, values, "int")
            check_sizes(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    check_int("threads", threads, optional=True)
    check_number("seconds", seconds, above=0)
    place = _device(device)
    _check_device(place)
    thresholds.check_writable()
    if place.type == "cuda":
        table = _calibrate_gpu(place, channels, pixels, seconds, progress)
    else:
        with use_threads(threads) as used:
            table = _calibrate_cpu(used, channels, pixels, seconds, progress)
    policy.forget()
    return table


Progress = Callable[[str], None] | None


def _device(device: str | torch.device) -> torch.device:
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a CPU or a CUDA device, got {device!r}") from error


def _check_device(device: torch.device) -> None:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"there is no CUDA device to calibrate, got device {device}")
        problem = policy.triton_problem(torch.empty(0, device=device))
        if problem:
            raise RuntimeError(f"there are no kernels to calibrate on {device}: backend 'triton' {problem}")
    elif device.type != "cpu":
        raise ValueError(f"device must be a CPU or a CUDA device, got {device}")
    elif _extension.CPU_ERROR is not None:
        raise RuntimeError(f"there are no CPU kernels to calibrate: {_extension.CPU_ERROR}")


def _calibrate_cpu(
    threads: int, channels: Sequence[int] | None, pixels: Sequence[int] | None, seconds: float, progress: Progress
) -> thresholds.Table:
    table: thresholds.Table = {}
    for case in cases(channels or CHANNELS, pixels or PIXELS):
        density = min(_measure(case, seconds / _REPEATS) for _ in range(_REPEATS))
        weight = case.weight()
        kind = thresholds.kind(case.kernel, weight, case.channels_last)
        row = table.setdefault(kind, {}).setdefault(thresholds.channel_class(weight), {})
        row[thresholds.pixel_class(case.pixels)] = density
        thresholds.save(table, threads)  # what is measured stays, however it ends
        if progress:
            what = "tokens" if case.kernel in LINEAR else "pixels"
            progress(f"{kind}, {case.channels} channels, {case.pixels} {what}: {density:.2f}")
    return table


def _calibrate_gpu(
    device: torch.device,
    channels: Sequence[int] | None,
    pixels: Sequence[int] | None,
    seconds: float,
    progress: Progress,
) -> thresholds.Table:
    from gatedkernels import calibration_gpu  # which builds on this

    table: thresholds.Table = {}
    for case in calibration_gpu.cases(channels or calibration_gpu.CHANNELS, pixels or calibration_gpu.PIXELS):
        kind, channel_class, pixel_class = case.classes()
        density = calibration_gpu.measure(case, seconds, device)
        row = table.setdefault(kind, {}).setdefault(channel_class, {})
        row[pixel_class] = min(density, row.get(pixel_class, 1.0))  # two cases of a class: the more careful one
        thresholds.save(table, thresholds.GPU_THREADS, thresholds.gpu(device))
        if progress:
            progress(f"{kind}, {case.channels} channels, {case.pixels} pixels: {density:.2f}")
    return table


def crossing(densities: Sequence[float], seconds: Sequence[float], dense: float) -> float:
    """The density up to which a kernel is faster than the dense way, its time being a line.

    Args:
        densities: Where the kernel was measured.
        seconds: Its times there.
        dense: Time of the dense way.

    Returns:
        Between 0 and 1, to two digits.
    """
    slope, start = np.polyfit(densities, seconds, 1)
    allowed = _MARGIN * dense - start
    if slope <= 0:
        return float(allowed > 0)
    return round(min(max(allowed / slope, 0.0), 1.0), 2)


def _measure(case: Case, seconds: float) -> float:
    samples = interleave(_calls(case), seconds=seconds)
    dense, dense_open, *kernel = (Timing.of(times).median for times in samples.values())
    threshold = crossing(_DENSITIES, kernel, dense)
    # With every gate open the dense way has nothing to close.
    return threshold if kernel[-1] < _MARGIN * dense_open else min(threshold, _NEARLY_ALL)


def _calls(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The dense way, twice, and the kernel at every density."""
    call = _linear(case) if case.kernel in LINEAR else _convolution(case)
    calls = {f"{density}": call(density, ALWAYS) for density in _DENSITIES}
    return {"dense": call(0.5, _NEVER), "dense, all open": call(1.0, _NEVER), **calls}


def _linear(case: Case) -> Call:
    c = case.channels
    x, weight, bias = torch.randn(_SAMPLES, case.pixels, c), torch.randn(c, c) / c**0.5, torch.randn(c)
    ranks = torch.rand(_SAMPLES, c).argsort(1)
    operator = torch.ops.gatedkernels.gated_linear.default

    def call(density: float, threshold: float) -> Callable[[], Tensor]:
        mask = ranks < round(density * c)
        masks = (mask, None) if case.kernel == "linear_in" else (None, mask)
        return lambda: operator(x, weight, bias, *masks, False, "cpu", threshold)

    return call


def _convolution(case: Case) -> Call:
    c, size = case.channels, min(max(2048 // case.channels, 4), math.isqrt(case.pixels))
    x = torch.randn(max(case.pixels // size**2, 1), c, size, size)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(c, c, case.side, case.side) / (case.side * c**0.5), torch.randn(c)
    ranks = torch.rand(len(x), c).argsort(1)
    operators = torch.ops.gatedkernels

    def call(density: float, threshold: float) -> Callable[[], Tensor]:
        mask = ranks < round(density * c)
        if case.kernel == "gated_block":
            return lambda: operators.gated_block_cpu.default(x, weight, bias, weight, bias, mask, x, threshold)
        masks = (mask, None) if case.kernel == "conv_in" else (None, mask)
        return lambda: operators.gated_conv2d_cpu.default(x, weight, bias, *masks, threshold)

    return call
