"""Widths: operations with a width for every sample against loops, networks against ones built narrow, training.

``python -m bench.slimmable``, ``… networks``, ``… mixed`` and ``… training`` print the tables of
docs/performance-widths.md.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

import gatedkernels as gk
from bench.cases import WIDTHS
from gatedkernels.nn import make_divisible
from gatedkernels.reporting.baselines import check_same
from gatedkernels.reporting.timing import Ratio, interleave, time_call
from gatedkernels.training.methods import US3L
from gatedkernels.training.recipes import build_method, make_config

Call = Callable[[], Tensor]

_DIM = {4: 1, 3: 2}  # of the channels: of images, and of tokens
# Batch, channels, side of the image, side of the window
CONVS = [
    *((16, 64, 32, 3), (16, 128, 16, 3), (16, 256, 8, 3), (16, 512, 4, 3)),
    *((16, 64, 56, 3), (16, 256, 14, 3), (16, 256, 14, 1), (16, 512, 7, 3)),
    *((4, 64, 32, 3), (4, 128, 16, 3), (4, 256, 8, 3), (4, 512, 4, 3)),
]
# Batch, tokens, inputs, units
LINEARS = [(4, 65, 192, 768), (16, 65, 192, 768), (16, 197, 384, 1536), (16, 197, 1536, 384), (16, 16, 384, 1536)]
# Name, side of the image, batch, width
NETWORKS = [
    *(("slimmable_resnet18", 32, batch, width) for batch in (1, 16) for width in (0.25, 0.5, 1.0)),
    *(("slimmable_resnet18", 224, 1, width) for width in (0.25, 0.5)),
    *(("slimmable_resnet50", 32, 16, width) for width in (0.25, 0.5)),
    *(("slimmable_mobilenet_v2", 32, batch, 0.25) for batch in (1, 16)),
]
# Name and batch of networks with a width for every sample
MIXED = [("slimmable_resnet18", 4), ("slimmable_resnet18", 16), ("slimmable_resnet50", 16)]
# Widths of an iteration of US3L, the first of which the others are compared with
ITERATIONS = [[1.0], [1.0, 0.25], [1.0, 0.5, 0.25], [1.0, 0.75, 0.25], [1.0, 0.75, 0.5]]


def by_samples(run: Callable[..., Tensor], x: Tensor, y: Tensor, ins: list[int], outs: list[int]) -> Tensor:
    """Each sample by itself, through PyTorch, into zeros like y; ``run(x, o, i)`` computes o channels from i."""
    y = torch.zeros_like(y)
    for n in range(len(x)):
        y.narrow(_DIM[y.ndim], 0, outs[n])[n : n + 1] = run(x[n : n + 1], outs[n], ins[n])
    return y


def by_groups(run: Callable[..., Tensor], x: Tensor, y: Tensor, ins: list[int], outs: list[int]) -> Tensor:
    """Samples of equal widths together, gathered and scattered, through PyTorch, into zeros like y."""
    y = torch.zeros_like(y)
    groups: dict[tuple[int, int], list[int]] = {}
    for n, pair in enumerate(zip(ins, outs, strict=True)):
        groups.setdefault(pair, []).append(n)
    for (i, o), members in groups.items():
        at, dim = torch.tensor(members), _DIM[y.ndim]
        y.narrow(dim, 0, o)[at] = run(x.narrow(dim, 0, i)[at], o, i)
    return y


def conv_calls(batch: int, channels: int, size: int, window: int) -> dict[str, Call]:
    """A convolution with a width for every sample, three ways that compute the same."""
    form = torch.channels_last
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=form)
    weight = torch.randn(channels, channels, window, window).contiguous(memory_format=form)
    widths = [make_divisible(channels * WIDTHS[n % len(WIDTHS)]) for n in range(batch)]
    each = torch.tensor(widths)

    def run(x: Tensor, outs: int, ins: int) -> Tensor:
        return conv2d(x[:, :ins], weight[:outs, :ins], padding=window // 2)

    return {
        "ours": lambda: gk.sliced_conv2d(x, weight, None, each, each, padding=window // 2),
        "samples": lambda: by_samples(run, x, x, widths, widths),
        "groups": lambda: by_groups(run, x, x, widths, widths),
    }


def linear_calls(batch: int, tokens: int, inputs: int, units: int) -> dict[str, Call]:
    """A linear layer with a width for every sample, three ways that compute the same."""
    x, weight, y = torch.randn(batch, tokens, inputs), torch.randn(units, inputs), torch.empty(batch, tokens, units)
    ins, outs = ([make_divisible(c * WIDTHS[n % len(WIDTHS)]) for n in range(batch)] for c in (inputs, units))
    each_in, each_out = torch.tensor(ins), torch.tensor(outs)

    def run(x: Tensor, outs: int, ins: int) -> Tensor:
        return linear(x[..., :ins], weight[:outs, :ins])

    return {
        "ours": lambda: gk.sliced_linear(x, weight, None, each_in, each_out),
        "samples": lambda: by_samples(run, x, y, ins, outs),
        "groups": lambda: by_groups(run, x, y, ins, outs),
    }


def network_calls(name: str, size: int, batch: int, width: float) -> dict[str, Call]:
    """A slimmable network at a width, and one built so narrow, both eager and optimised."""
    stem = "cifar" if size < 64 else "imagenet"
    net, x = gk.models.create_model(name, num_classes=10, stem=stem), torch.randn(batch, 3, size, size)
    gk.calibrate_norms(net, [x], [width])
    net.eval().set_width(width)
    narrow = gk.slice(net, width).to(memory_format=torch.channels_last)
    fast, narrow_fast = gk.optimize(net, x), gk.optimize(narrow, x)
    last = x.contiguous(memory_format=torch.channels_last)
    return {
        "slimmable": lambda: net(x),
        "narrow": lambda: narrow(last),
        "slimmable, optimised": lambda: fast(x),
        "narrow, optimised": lambda: narrow_fast(x),
    }


def mixed_calls(name: str, batch: int, size: int = 32) -> dict[str, Call]:
    """An eager slimmable network with a width for every sample, and loops of narrow ones that are cut out of it."""
    form = torch.channels_last
    net = gk.models.create_model(name, num_classes=10, stem="cifar").to(memory_format=form)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=form)
    gk.calibrate_norms(net, [x], WIDTHS)
    net.eval()
    narrow = {width: gk.slice(net, width) for width in WIDTHS}
    each = [WIDTHS[n % len(WIDTHS)] for n in range(batch)]
    groups = {width: torch.tensor([n for n in range(batch) if each[n] == width]) for width in WIDTHS}

    def together() -> Tensor:
        with gk.width(net, each):
            return net(x)

    def by_widths() -> Tensor:
        y = torch.empty(batch, 10)
        for width, members in groups.items():
            y[members] = narrow[width](x[members])
        return y

    return {
        "ours": together,
        "samples": lambda: torch.cat([narrow[width](x[n : n + 1]) for n, width in enumerate(each)]),
        "groups": by_widths,
    }


def milliseconds(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Medians of runs in random order, after a check that all compute the same."""
    want = calls[list(calls)[-1]]().double().clone()
    for name, call in calls.items():
        check_same(name, call(), want)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in random.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


class Iterations(US3L):
    """US3L without a trainer."""

    def __init__(self, *method: Any) -> None:
        super().__init__(*method)
        self.sgd = self.configure_optimizers()

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimiser; nobody counts its steps."""
        return self.sgd

    def manual_backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """Without scaling."""
        loss.backward()


def iteration_times(batch: int, seconds: float) -> list[list[float]]:
    """Seconds of whole iterations of US3L on a slimmable ResNet-18 and 32×32 images, at each of the lists of widths."""
    config = make_config("us3l", batch_size=batch)
    method = Iterations(build_method(config).backbone.to(memory_format=torch.channels_last), config)
    views = [torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]

    def iteration(widths: Sequence[float]) -> Callable[[], object]:
        return lambda: method.iterate(views, widths, epoch=config.epochs - 1)

    times: list[list[float]] = [[] for _ in ITERATIONS]
    iteration(ITERATIONS[-1])()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for widths, taken in zip(ITERATIONS, times, strict=True):
            taken.append(time_call(iteration(widths)))
    return times


def operation_rows(seconds: float, pattern: str) -> Iterator[tuple[object, ...]]:
    """Milliseconds of operations with a width for every sample; of linear layers, the least that any kernel takes, too.

    That is the time of its multiply-adds at the rate of a large matrix product, measured next to it.
    """
    rows = [(("conv", *case), conv_calls(*case)) for case in CONVS]
    rows += [(("linear", *case), linear_calls(*case)) for case in LINEARS]
    a, b = torch.randn(2, 1024, 1024)
    with torch.inference_mode():
        for case, calls in rows:
            if pattern not in " ".join(map(str, case)):
                continue
            taken = milliseconds(calls, seconds)
            if case[0] == "linear":
                _, batch, tokens, inputs, units = case
                products = tokens * inputs * units * sum(WIDTHS[n % len(WIDTHS)] ** 2 for n in range(batch))
                taken["least"] = (
                    milliseconds({"product": lambda: a @ b}, seconds / 4)["product"] * products / len(a) ** 3
                )
            yield *case, *(f"| {name} {value:.3f}" for name, value in taken.items())


def network_rows(seconds: float, pattern: str) -> Iterator[tuple[object, ...]]:
    """Milliseconds of networks, and how much longer the optimised slimmable one takes than the narrow one."""
    for case in NETWORKS:
        if pattern not in " ".join(map(str, case)):
            continue
        with torch.inference_mode():
            calls = network_calls(*case)
            taken = milliseconds(calls, seconds / 4)
        samples = interleave({name: call for name, call in calls.items() if "optimised" in name}, seconds=seconds)
        ratio = Ratio.of(samples["slimmable, optimised"], samples["narrow, optimised"])
        columns = [f"| {name} {value:.3f}" for name, value in taken.items()]
        yield *case, *columns, f"| ratio {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def mixed_rows(seconds: float) -> Iterator[tuple[object, ...]]:
    """Milliseconds of networks with a width for every sample."""
    with torch.inference_mode():
        for case in MIXED:
            yield *case, *(f"| {name} {value:.1f}" for name, value in milliseconds(mixed_calls(*case), seconds).items())


def training_rows(batch: int, seconds: float) -> Iterator[tuple[object, ...]]:
    """Iterations of US3L: how many times as long as at full width they take, and the sum of their widths squared."""
    times = iteration_times(batch, seconds)
    for widths, taken in zip(ITERATIONS, times, strict=True):
        ratio, work = Ratio.of(taken, times[0]), sum(width * width for width in widths)
        milliseconds = 1e3 * statistics.median(taken)
        yield (
            *widths, f"| ms {milliseconds:.0f} | times {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
            f"| work {work:.4f} | over {ratio.value / work:.3f}",
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="operations", choices=["operations", "networks", "mixed", "training"]
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row; of training, for all of them")
    parser.add_argument("--only", default="", help="rows whose first columns, so written, hold this")
    parser.add_argument("--batch", type=int, default=64, help="images of an iteration of training")
    chosen = parser.parse_args(arguments)
    if chosen.what == "operations":
        rows = operation_rows(chosen.seconds, chosen.only)
    elif chosen.what == "networks":
        rows = network_rows(chosen.seconds, chosen.only)
    elif chosen.what == "mixed":
        rows = mixed_rows(chosen.seconds)
    else:
        rows = training_rows(chosen.batch, chosen.seconds)
    for row in rows:
        print(*row, flush=True)


if __name__ == "__main__":
    main()
