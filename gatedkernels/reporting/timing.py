"""Measure several ways to do the same in turn, so that whatever slows the machine slows them all."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from gatedkernels._checks import check_int

_MIN_ROUNDS = 5


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
        median: Half of the calls took no longer.
        low: A quarter of the calls took no longer.
        high: Three quarters of the calls took no longer.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarise samples.

        Raises:
            ValueError: If there are none.
        """
        if len(samples) == 0:
            raise ValueError("samples must hold at least one time, got none")
        low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


class Ratio(NamedTuple):
    """How many times as fast one thing is as another.

    Attributes:
        value: Ratio of the medians.
        low: The true ratio lies above it with 95 % confidence.
        high: The true ratio lies below it with 95 % confidence.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float], *, draws: int = 2000, seed: int = 0) -> "Ratio":
        """Divide medians; bounds by the bootstrap over rounds.

        Args:
            slow: Times above the fraction line, one a round.
            fast: Times below it, of the same rounds.
            draws: Times to resample.
            seed: Decides the draws.

        Raises:
            ValueError: If there are not as many of the one as of the other, or none.
        """
        if len(slow) != len(fast) or len(slow) == 0:
            raise ValueError(f"slow and fast must come from the same rounds, got {len(slow)} and {len(fast)} times")
        picks = np.random.default_rng(seed).integers(len(slow), size=(draws, len(slow)))
        above, below = (np.median(np.asarray(samples)[picks], axis=1) for samples in (slow, fast))
        low, high = np.quantile(above / below, (0.05, 0.95)).tolist()
        return cls(float(np.median(slow) / np.median(fast)), low, high)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    rounds: int | None = None,
    warmup: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Time functions in turn, round after round, without gradients.

    In each round every function runs twice and the second call is timed: it finds its own weights in the caches, as in
    a process that does nothing else, and not its rivals'.

    Args:
        calls: The functions, by name.
        seconds: How long to go on, untimed calls included; at least five rounds.
        rounds: Exactly so many rounds instead.
        warmup: Rounds before the first that counts.
        device: Where they compute; work queued there is waited for.

    Returns:
        Seconds of every round by name.

    Raises:
        ValueError: If there is nothing to time, or ``rounds`` or ``seconds`` is not positive.
    """
    if not calls:
        raise ValueError("calls must hold at least one function, got none")
    for name, value in {"seconds": seconds, "rounds": rounds}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(warmup):
            for call in calls.values():
                call()
        synchronize(device)
        end = time.perf_counter() + seconds
        done = 0
        while done < (rounds or _MIN_ROUNDS) or (rounds is None and time.perf_counter() < end):
            for name, call in calls.items():
                call()
                samples[name].append(time_call(call, device))
            done += 1
    return samples


def time_call(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Time one call, in seconds."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device | str) -> None:
    """Wait for what is queued on a device; a CPU has no queue."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Compute with so many threads for a while; None: as many as there are.

    Yields:
        The number of threads.

    Raises:
        ValueError: If it is not positive.
    """
    check_int("threads", threads, optional=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
