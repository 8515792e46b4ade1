"""Measure up to which density the Triton kernels beat the dense way, on this GPU."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedkernels import policy, thresholds
from gatedkernels.calibration import crossing
from gatedkernels.reporting.timing import Timing

TRAINING = "_training"  # a kernel with its backward
KERNELS = (
    *(("gated_block", 3), ("conv_out", 3), ("conv_in", 3), ("conv_out", 1), ("conv_in", 1)),
    *(("linear_out", 1), ("linear_in", 1)),  # a sample has as many tokens as an image has pixels
    *((f"{name}{TRAINING}", 3) for name in ("gated_block", "conv_out", "conv_in")),
    *((f"linear_{name}{TRAINING}", 1) for name in ("out", "in")),
)
CHANNELS = (64, 128, 256, 512)
PIXELS = (1024, 4096, 16384, 65536, 262144)
IMAGES = (4, 8, 16, 32, 56)  # sides of the outputs of one sample
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Call = Callable[[], object]
Timer = Callable[[Mapping[str, Call], float], dict[str, list[float]]]

_DENSITIES = (0.25, 0.5, 0.75, 1.0)
_NEVER = -1.0  # a threshold that every density exceeds
_MARGIN = 0.98  # a kernel serves where it is faster by more than what a median errs
_TOLERATED = 1.03  # what the dense side may cost of PyTorch's dense way, where the device chooses
_MOST_MACS = 1 << 36  # classes of larger batches take the threshold of the next smaller one
_REPEATED = 8  # calls in a captured graph
# PyTorch's flags for how float32 numbers are multiplied.
CONV_FLAG = torch.backends.cudnn.conv  # type: ignore[attr-defined]
LINEAR_FLAG = torch.backends.cuda.matmul


class Case(NamedTuple):
    """A class of calls, channels-last, from as many channels to as many."""

    kernel: str
    side: int
    channels: int
    batch: int
    image: int
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        """Output pixels of the whole batch."""
        return self.batch * self.image**2

    def classes(self) -> tuple[str, int, int]:
        """What the threshold is found under: kind, class of channels, class of pixels."""
        weight = torch.empty(self.channels, self.channels, self.side, self.side, dtype=self.dtype, device="meta")
        flag = LINEAR_FLAG if self.kernel.startswith("linear") else CONV_FLAG
        rounded = flag.fp32_precision == "tf32"
        kind = thresholds.gpu_kind(self.kernel, weight, rounded, self.image**2)
        return kind, thresholds.channel_class(weight), thresholds.pixel_class(self.pixels)


def cases(channels: Sequence[int] = CHANNELS, pixels: Sequence[int] = PIXELS) -> list[Case]:
    """The classes to measure, but for those that take very long."""
    return [
        Case(kernel, side, c, p // image**2, image, dtype)
        for kernel, side in KERNELS
        for dtype in DTYPES
        for image in IMAGES
        for c in channels
        for p in pixels
        if p >= image**2 and c * c * side * side * p <= _MOST_MACS
    ]


def measure(case: Case, seconds: float, device: torch.device, timer: Timer | None = None) -> float:
    """The threshold of a class of calls.

    Args:
        case: The class.
        seconds: How long to measure, about.
        device: Where.
        timer: Times calls by name, in so many seconds; None: captured graphs, by events.

    Returns:
        1 where the kernels win at any density; where the device can choose between two sides, the density up to which
        the gated one wins, provided that the dense one costs hardly more than PyTorch's; else 0.
    """
    samples = (timer or time_graphs)(calls(case, device), seconds)
    times = {name: Timing.of(each).median for name, each in samples.items()}
    dense = times["dense"]
    if max(times[f"gated {density}"] for density in _DENSITIES) <= _MARGIN * dense:
        return 1.0
    if "other side" not in times or times["other side"] > _TOLERATED * dense:
        return 0.0
    partly = _DENSITIES[:-1]
    return min(crossing(partly, [times[f"switched {density}"] for density in partly], dense), 0.99)


def calls(case: Case, device: torch.device) -> dict[str, Call]:
    """The dense way, the kernels at every density, and the device's choice with either side serving."""
    c, side = case.channels, case.side
    like: dict[str, Any] = {"device": device, "dtype": case.dtype}
    x = torch.randn(case.batch, c, case.image, case.image, **like).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(c, c, side, side, **like) / (side * c**0.5), torch.randn(c, **like)
    weight = weight.contiguous(memory_format=torch.channels_last)
    ranks = torch.rand(case.batch, c, device=device).argsort(1)

    def call(backend: str, density: float, threshold: float) -> Call:
        mask = ranks < round(density * c)
        return lambda: _run(case, x, weight, bias, mask, backend, threshold)

    found = {"dense": call("dense", 0.5, 1.0)}
    found |= {f"gated {density}": call("triton", density, 1.0) for density in _DENSITIES}
    if case.kernel in policy.SWITCHED and policy.can_switch(c):
        found |= {f"switched {density}": call("triton", density, 0.999) for density in _DENSITIES[:-1]}
        found["other side"] = call("triton", 1.0, _NEVER)
    return found


def _run(case: Case, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, backend: str, threshold: float) -> Tensor:
    """One call; with its backward, from a gradient of ones, where that is measured too."""
    if not case.kernel.endswith(TRAINING):
        return _forward(case, x, weight, bias, mask, backend, threshold)
    with torch.inference_mode(False), torch.enable_grad():
        x, weight, bias = (tensor.detach().requires_grad_() for tensor in (x, weight, bias))
        y = _forward(case, x, weight, bias, mask, backend, threshold)
        gradients = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _forward(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, backend: str, threshold: float
) -> Tensor:
    operators, ones = torch.ops.gatedkernels, (1, 1)
    kernel = case.kernel.removesuffix(TRAINING)
    if kernel == "gated_block":
        block = x, weight, bias, weight, bias, mask, x, ones
        switched = threshold < 1
        return operators.switched_block(*block, threshold) if switched else operators.gated_block(*block, backend)
    masks = (mask, None) if kernel.endswith("_in") else (None, mask)
    if kernel.startswith("linear"):
        tokens, rows = x.permute(0, 2, 3, 1).flatten(1, 2), weight.flatten(1)
        return operators.gated_linear.default(tokens, rows, bias, *masks, False, backend, threshold)
    padding = (case.side // 2,) * 2
    return operators.gated_conv2d.default(x, weight, bias, *masks, ones, padding, ones, 1, False, backend, threshold)


def time_graphs(calls_: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call by name, in turn: every call captured in a graph of its own, replays timed by events."""
    graphs = {name: _capture(call) for name, call in calls_.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    spent = 0.0
    while spent < seconds or len(next(iter(samples.values()))) < 5:
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / 1000 / _REPEATED)
            spent += 2 * _REPEATED * samples[name][-1]
    return samples


def _capture(call: Call) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():  # what is captured must have been compiled before
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        for _ in range(_REPEATED):
            call()
    return graph
