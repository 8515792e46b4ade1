"""Masks of a chosen density in place of what the gates decide, for tests and benchmarks."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels.nn.gate import Gate, gate_key
from gatedkernels.nn.packed import PackedGate

_DRAWS = 16


@contextmanager
def fix_gates(model: nn.Module, density: float | Mapping[str, float], seed: int = 0) -> Iterator[None]:
    """Replace what every gate decides by random masks with exactly so many open channels in each sample.

    Masks are a function of seed, gate name, N, C and the number of the call, so that a network and its optimised copy
    get the same. Gates still run, and cost what they cost. Draws are made at a gate's first call with a shape and then
    taken in turn, sixteen of them, so that later calls pay nothing and no cache learns one mask by heart. A compiled
    or captured model keeps the mask that it was captured with, and a copy made meanwhile keeps its masks for good.

    Args:
        model: A module whose gates have ``is_gate = True`` and return a `Gate` or a bool mask.
        density: Fraction of open channels, exactly ``round(density * C)`` of a mask's C decisions in each sample; or
            one for every gate by key ("layer1.0", "layer1.0.gate2"), gates without one being left alone.
        seed: Another seed, other masks.

    Yields:
        Nothing; gates decide for themselves again afterwards.

    Raises:
        ValueError: If the model has no gates, a key names none, or a density does not lie in [0, 1].
    """
    gates = {gate_key(name): module for name, module in model.named_modules() if getattr(module, "is_gate", False)}
    if not gates:
        raise ValueError(f"model must contain gates, got {type(model).__name__} without")
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(gates, density)
    if unknown := sorted(densities.keys() - gates.keys()):
        raise ValueError(f"density must name gates of the model ({', '.join(gates)}), got {', '.join(unknown)}")
    for value in densities.values():
        if not 0 <= value <= 1:
            raise ValueError(f"density must lie in [0, 1], got {value}")
    with ExitStack() as stack:
        for key, value in densities.items():
            gate, masks = gates[key], _FixedMasks(key, value, seed)
            if isinstance(gate, PackedGate):  # part of its block's operator
                stack.callback(setattr, gate, "fixed", gate.fixed)
                gate.fixed = partial(masks.of_packed, gate)
            else:
                stack.callback(gate.register_forward_hook(masks).remove)
        yield


class _FixedMasks:
    """Answers for one gate: a forward hook, or what a packed gate asks."""

    def __init__(self, key: str, density: float, seed: int) -> None:
        self.key, self.density, self.seed = key, density, seed
        self.calls = 0
        self.drawn: dict[tuple[Any, ...], list[Gate]] = {}

    def __call__(self, module: nn.Module, args: Any, output: Gate | Tensor) -> Gate | Tensor:
        if isinstance(output, Gate):
            return self._next(tuple(output.mask.shape), output.mask.device, output.weight.dtype)
        return self._next(tuple(output.shape), output.device, torch.float32).mask

    def of_packed(self, gate: PackedGate, batch: int) -> Tensor:
        return self._next((batch, len(gate.bias2)), gate.bias2.device, torch.float32).mask

    def _next(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Gate:
        where = (*shape, device, dtype)
        if where not in self.drawn:
            self.drawn[where] = [
                Gate(drawn, drawn.to(dtype))
                for drawn in draw_masks(self.key, self.density, self.seed, *shape).to(device).unbind()
            ]
        fixed = self.drawn[where][self.calls % _DRAWS]
        self.calls += 1
        return fixed


def draw_masks(key: str, density: float, seed: int, batch: int, channels: int) -> Tensor:
    """Draw the masks that `fix_gates` takes in turn, bool, shape (16, N, C), on the CPU."""
    digest = hashlib.sha256(f"{seed}|{key}|{batch}|{channels}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    ranks = torch.rand(_DRAWS, batch, channels, generator=generator).argsort(-1).argsort(-1)
    return ranks < round(density * channels)
