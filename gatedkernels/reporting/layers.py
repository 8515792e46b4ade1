"""Time the layers of networks while the networks run."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels.reporting.timing import synchronize

_MIN_ROUNDS = 5


class Stopwatch:
    """Hooks that note how long some modules of a network take, and the sizes of what goes in and out.

    Attributes:
        samples: Seconds of every timed run, by layer.
        elements: Numbers read as input and written as output, by layer.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.network = network
        self.samples: dict[str, list[float]] = {name: [] for name in layers}
        self.elements: dict[str, int] = {}
        self._starts: dict[str, float] = {}

    def run(self, x: Tensor) -> None:
        """Run the network once and note the times."""
        handles = []
        for name in self.samples:
            module = self.network.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(self._start, name)))
            handles.append(module.register_forward_hook(partial(self._stop, name)))
        try:
            self.network(x)
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        synchronize(args[0].device)
        self._starts[name] = time.perf_counter()

    def _stop(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        synchronize(args[0].device)
        self.samples[name].append(time.perf_counter() - self._starts[name])
        y = output[0] if isinstance(output, tuple) else output
        self.elements[name] = args[0].numel() + y.numel()


def time_layers(
    networks: Mapping[str, tuple[nn.Module, Tensor]], layers: Sequence[str], *, seconds: float
) -> dict[str, Stopwatch]:
    """Time layers of several networks in turn, as `interleave` does it for whole calls.

    Args:
        networks: Networks and their inputs, by name.
        layers: Names of modules that all of them have.
        seconds: How long to go on; at least five rounds.

    Returns:
        What was noted, by the networks' names.
    """
    watches = {name: Stopwatch(network, layers) for name, (network, _) in networks.items()}
    runs: list[Callable[[], object]] = [partial(network, x) for network, x in networks.values()]
    with torch.inference_mode():
        for run in runs:
            run()
        end = time.perf_counter() + seconds
        done = 0
        while done < _MIN_ROUNDS or time.perf_counter() < end:
            for run, watch, (_, x) in zip(runs, watches.values(), networks.values(), strict=True):
                run()
                watch.run(x)
            done += 1
    return watches
