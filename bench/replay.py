"""Masks for benchmarks: random ones with and without correlation, and recorded ones."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gatedkernels import Gate

RECORDINGS = Path(__file__).parent / "masks"
# Odd, so that all of them are timed where every second call is.
DRAWS = 15

# Share of the variance of a gate's logit that all samples of a batch have in common, in "correlated" masks.
_SHARED = 0.8
# Height of a CIFAR image where a stage computes.
_SIZES = {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}


class RecordedBlock(NamedTuple):
    """A block whose masks were recorded: its gate's key, its channels, its image size, its mean density."""

    gate: str
    channels: int
    size: int
    density: float


def recordings() -> list[Path]:
    """The files in ``bench/masks``, sorted."""
    return sorted(RECORDINGS.glob("*.json"))


def recorded_blocks(path: Path) -> list[RecordedBlock]:
    """List the second blocks of the stages of a recorded ResNet-18, whose in- and output have the same size."""
    gates = _read(path)["gates"]
    return [
        RecordedBlock(key, gate["channels"], _SIZES[key.partition(".")[0]], gate["density"])
        for key, gate in gates.items()
        if key.endswith(".1")
    ]


def draw(kind: str, density: float, batch: int, channels: int, seed: int = 0) -> Tensor:
    """Draw masks, bool, shape (draws, N, C).

    Args:
        kind: "independent": each channel of each sample is open with probability ``density``; "correlated": the
            samples of a batch mostly agree; "<file>:<gate>": as recorded in ``bench/masks/<file>.json``.
        density: Fraction of open channels, on average; not for recorded ones, which have their own.
        batch: Samples.
        channels: Channels; fewer than recorded ones have are their first ones.
        seed: Decides the draws.

    Raises:
        ValueError: If there is no such kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind in ("independent", "correlated"):
        shared = 0.0 if kind == "independent" else _SHARED
        common = torch.randn(DRAWS, 1, channels, generator=generator)
        own = torch.randn(DRAWS, batch, channels, generator=generator)
        open_below = torch.special.ndtri(torch.tensor(density))
        return common * sqrt(shared) + own * sqrt(1 - shared) < open_below
    name, _, gate = kind.partition(":")
    path = RECORDINGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"kind must be 'independent', 'correlated' or a recording in {RECORDINGS}, got {kind!r}")
    samples = _stored(_read(path), gate)[:, :channels]
    draws = len(samples) // batch
    if draws == 0:
        raise ValueError(f"batch must not exceed the {len(samples)} recorded samples, got {batch}")
    draws -= draws % 2 == 0
    return samples[: draws * batch].unflatten(0, (draws, batch))


@contextmanager
def open_as(gate: nn.Module, masks: Tensor) -> Iterator[None]:
    """Let a gate, which still runs, answer with masks (draws, N, C) in turn."""
    answers = [Gate(mask, mask.float()) for mask in masks]
    calls = count()

    def answer(module: nn.Module, args: Any, output: Gate | Tensor) -> Gate | Tensor:
        fixed = answers[next(calls) % len(answers)]
        return fixed if isinstance(output, Gate) else fixed.mask

    handle = gate.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _stored(recording: dict[str, Any], gate: str) -> Tensor:
    """The masks that ``gatedkernels masks`` stored for a gate, bool, shape (samples, C): packed bits in base 64."""
    stored, channels = recording["stored"], recording["gates"][gate]["channels"]
    packed = np.frombuffer(base64.b64decode(stored["masks"][gate]), np.uint8)
    bits = np.unpackbits(packed, count=stored["count"] * channels)
    return torch.from_numpy(bits.reshape(stored["count"], channels)).bool()
