"""One way to measure a trial, and the cell of the results that comes out."""

import time
from typing import Any, NamedTuple

import torch

from bench.trials import Call, Trial
from gatedkernels.reporting.timing import Ratio, Timing, interleave, time_call

_LEAST_ROUNDS, _MOST_ROUNDS = 15, 400
_WARMUP_ROUNDS = 3
_CHOICE_SECONDS = 0.3


class Cell(NamedTuple):
    """What was measured of one case, milliseconds.

    Attributes:
        group: What kind of case: "block", "network", "functional", "masks".
        name: The test's name, which pytest runs again.
        facts: The case's fields.
        baseline: The dense way it was measured against: the fastest of those tried.
        rounds: How often each was timed.
        kept: Executed over dense multiply-adds.
        dense_ms: Median, lower and upper quartile of the dense way.
        gated_ms: The same of the gated one.
        speedup: Ratio of the medians, and its bounds, each with 95 % confidence.
        efficiency: Speed-up × kept.
    """

    group: str
    name: str
    facts: dict[str, Any]
    baseline: str
    rounds: int
    kept: float
    dense_ms: list[float]
    gated_ms: list[float]
    speedup: list[float]
    efficiency: float


def try_once(trial: Trial) -> None:
    """Run everything once, to see that it works."""
    with torch.inference_mode():
        trial.gated()
        for call in trial.dense.values():
            call()


def measure(trial: Trial, benchmark: Any, seconds: float) -> tuple[str, list[float], list[float]]:
    """Measure a trial with pytest-benchmark, its rounds interleaved with the dense way's.

    In each round the dense way runs twice and then the gated one does, and the second call of each is timed: it finds
    its own weights in the caches, as in a process that does nothing else.

    Args:
        trial: What to measure.
        benchmark: The fixture of pytest-benchmark.
        seconds: How long, about; at least fifteen rounds.

    Returns:
        The name of the dense way, and seconds of dense and gated calls, round by round.
    """
    with torch.inference_mode():
        baseline = fastest(trial.dense)
        dense = trial.dense[baseline]
        dense_s: list[float] = []

        def time_the_dense() -> None:
            dense()
            dense_s.append(time_call(dense))
            trial.gated()

        start = time.perf_counter()
        time_the_dense()
        trial.gated()
        rounds = round(seconds / (time.perf_counter() - start))
        rounds = min(max(rounds, _LEAST_ROUNDS), _MOST_ROUNDS)
        benchmark.pedantic(trial.gated, setup=time_the_dense, rounds=rounds, warmup_rounds=_WARMUP_ROUNDS, iterations=1)
    gated_s = list(benchmark.stats.stats.data)
    return baseline, dense_s[-len(gated_s) :], gated_s


def fastest(ways: dict[str, Call]) -> str:
    """Name the fastest of several ways."""
    if len(ways) == 1:
        return next(iter(ways))
    samples = interleave(ways, seconds=_CHOICE_SECONDS)
    return min(samples, key=lambda name: Timing.of(samples[name]).median)


def make_cell(
    group: str,
    name: str,
    facts: dict[str, Any],
    kept: float,
    baseline: str,
    dense_s: list[float],
    gated_s: list[float],
) -> Cell:
    """Summarise what was measured."""
    dense, gated, ratio = Timing.of(dense_s), Timing.of(gated_s), Ratio.of(dense_s, gated_s)
    return Cell(
        group,
        name,
        facts,
        baseline,
        len(gated_s),
        kept,
        [value * 1e3 for value in dense],
        [value * 1e3 for value in gated],
        list(ratio),
        ratio.value * kept,
    )
