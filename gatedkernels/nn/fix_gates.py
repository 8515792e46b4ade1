"""Masks of a chosen density in place of what the gates decide, for tests and benchmarks."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_int, check_module, check_number
from gatedkernels.nn.codebook import Codes
from gatedkernels.nn.gate import Gate, gate_key
from gatedkernels.nn.packed import PackedGate
from gatedkernels.nn.packed_codebook import PackedCodebookGate

_DRAWS = 16


@contextmanager
def fix_gates(model: nn.Module, density: float | Mapping[str, float], seed: int = 0) -> Iterator[None]:
    """Replace what every gate decides by random masks with exactly so many open channels in each sample.

    Masks are a function of seed, gate name, N, C and the number of the call, so that a network and its optimised copy
    get the same; those of a codebook are rows of a table with as many masks as the gate has, one a sample. Gates still
    run, and cost what they cost. Draws are made at a gate's first call with a shape and then
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
        TypeError: If the model is no module, a density no number, or the seed no int.
        ValueError: If the model has no gates, a key names none, or a density does not lie in [0, 1].
    """
    check_module("model", model)
    check_int("seed", seed, None)
    gates = {gate_key(name): module for name, module in model.named_modules() if getattr(module, "is_gate", False)}
    if not gates:
        raise ValueError(f"model must contain gates, got {type(model).__name__} without")
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(gates, density)
    if unknown := sorted(densities.keys() - gates.keys()):
        raise ValueError(f"density must name gates of the model ({', '.join(gates)}), got {', '.join(unknown)}")
    for value in densities.values():
        check_number("density", value, at_least=0, at_most=1)
    with ExitStack() as stack:
        for key, value in densities.items():
            gate = gates[key]
            masks = _FixedMasks(key, value, seed, getattr(gate, "codebook", None))
            if isinstance(gate, PackedGate):  # part of its block's operator
                own: Callable[..., Any] = masks.of_codebook if isinstance(gate, PackedCodebookGate) else masks.of_packed
                stack.callback(setattr, gate, "fixed", gate.fixed)
                gate.fixed = partial(own, gate)
            else:
                stack.callback(gate.register_forward_hook(masks).remove)
        yield


class _FixedMasks:
    """Answers for one gate: a forward hook, or what a packed gate asks."""

    def __init__(self, key: str, density: float, seed: int, codebook: int | None) -> None:
        self.key, self.density, self.seed, self.codebook = key, density, seed, codebook
        self.calls = 0
        self.drawn: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, module: nn.Module, args: Any, output: Gate | Tensor) -> Gate | Tensor:
        mask = output.mask if isinstance(output, Gate) else output
        fixed = self._mask((mask.shape[0], mask.shape[1]), mask.device)
        return Gate(fixed, fixed.to(output.weight.dtype)) if isinstance(output, Gate) else fixed

    def of_packed(self, gate: PackedGate, batch: int) -> Tensor:
        return self._mask((batch, gate.decisions), gate.bias2.device)

    def of_codebook(self, gate: PackedCodebookGate, batch: int) -> Codes:
        return self._next((batch, gate.decisions), gate.table.device)

    def _mask(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        drawn = self._next(shape, device)
        return drawn.table[drawn.codes] if isinstance(drawn, Codes) else drawn

    def _next(self, shape: tuple[int, int], device: torch.device) -> Any:
        where = (*shape, device)
        if where not in self.drawn:
            self.drawn[where] = self._draw(*shape, device)
        fixed = self.drawn[where][self.calls % _DRAWS]
        self.calls += 1
        return fixed

    def _draw(self, batch: int, channels: int, device: torch.device) -> list[Any]:
        draw = self.key, self.density, self.seed, batch, channels
        if self.codebook is None:
            return list(draw_masks(*draw).to(device).unbind())
        table, codes = (each.to(device).unbind() for each in draw_codes(*draw, self.codebook))
        return [Codes(*pair) for pair in zip(table, codes, strict=True)]


def draw_masks(key: str, density: float, seed: int, batch: int, channels: int) -> Tensor:
    """Draw the masks that `fix_gates` takes in turn, bool, shape (16, N, C), on the CPU."""
    return _draw_open((_DRAWS, batch, channels), density, _generator(seed, key, batch, channels))


def draw_codes(key: str, density: float, seed: int, batch: int, channels: int, masks: int) -> Codes:
    """Draw the tables, bool, shape (16, masks, C), and codes, shape (16, N), that it takes for gates of a codebook."""
    generator = _generator(seed, key, batch, channels, masks)
    table = _draw_open((_DRAWS, masks, channels), density, generator)
    return Codes(table, torch.randint(masks, (_DRAWS, batch), generator=generator))


def _draw_open(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    ranks = torch.rand(shape, generator=generator).argsort(-1).argsort(-1)
    return ranks < round(density * shape[-1])


def _generator(*facts: Any) -> torch.Generator:
    digest = hashlib.sha256("|".join(map(str, facts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
