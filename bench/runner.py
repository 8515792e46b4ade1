"""One way to measure a trial, and the cell of the results that comes out."""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from bench.trials import Call, Trial
from gatedkernels.reporting.timing import Ratio, Timing, time_call

_LEAST_ROUNDS, _MOST_ROUNDS = 15, 400
_WARMUP_ROUNDS = 3
# Choosing the baseline: all ways for some rounds, then those that do not take so many times as long as another.
_CHOICE_SECONDS, _TRIAL_ROUNDS, _LEAST_ROUNDS_OF_CANDIDATES = 0.3, 3, 5
_HOPELESS = 1.5


class Cell(NamedTuple):
    """What was measured of one case, milliseconds.

    Attributes:
        group: What kind of case, a key of `bench.cases.GROUPS`.
        name: The test's name, which pytest runs again.
        facts: The case's fields.
        baseline: The dense way it was measured against: the fastest of those tried.
        rounds: How often each was timed.
        kept: Executed over dense multiply-adds.
        dense_ms: Median, lower and upper quartile of the dense way.
        gated_ms: The same of the gated one.
        speedup: Ratio of the medians, and its bounds, each with 95 % confidence.
        efficiency: Speed-up × kept.
        ways_ms: Milliseconds of every dense way that was tried; empty if there is only one.
        missing: Why a dense way was not tried, by name.
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
    ways_ms: Mapping[str, float] = MappingProxyType({})
    missing: Mapping[str, str] = MappingProxyType({})


class Measured(NamedTuple):
    """Times of a trial.

    Attributes:
        baseline: Name of the dense way.
        ways_ms: Milliseconds of every dense way, from which it was chosen; empty if there is only one.
        dense_s: Seconds of its calls, round by round.
        gated_s: Seconds of the gated calls, of the same rounds.
    """

    baseline: str
    ways_ms: dict[str, float]
    dense_s: list[float]
    gated_s: list[float]


def try_once(trial: Trial) -> None:
    """Run everything once, to see that it works."""
    with torch.inference_mode():
        trial.gated()
        for call in trial.dense.values():
            call()


def measure(trial: Trial, benchmark: Any, seconds: float) -> Measured:
    """Measure a trial with pytest-benchmark, its rounds interleaved with the dense way's.

    In each round the dense way is prepared and timed, and then the gated one.

    Args:
        trial: What to measure.
        benchmark: The fixture of pytest-benchmark.
        seconds: How long, about; at least fifteen rounds.
    """
    with torch.inference_mode():
        ways_ms = time_ways(trial)
        baseline = min(ways_ms, key=lambda name: ways_ms[name]) if ways_ms else next(iter(trial.dense))
        dense = trial.dense[baseline]
        dense_s: list[float] = []

        def time_the_dense() -> None:
            trial.prepare(dense)
            dense_s.append(time_call(dense))
            trial.prepare(trial.gated)

        start = time.perf_counter()
        time_the_dense()
        trial.gated()
        rounds = round(seconds / (time.perf_counter() - start))
        rounds = min(max(rounds, _LEAST_ROUNDS), _MOST_ROUNDS)
        benchmark.pedantic(trial.gated, setup=time_the_dense, rounds=rounds, warmup_rounds=_WARMUP_ROUNDS, iterations=1)
    gated_s = list(benchmark.stats.stats.data)
    return Measured(baseline, ways_ms, dense_s[-len(gated_s) :], gated_s)


def time_ways(trial: Trial) -> dict[str, float]:
    """Time the dense ways of a trial in turn: milliseconds, by name; nothing if there is only one.

    Ways that are much slower than another are timed three times and left out of further rounds.
    """
    if len(trial.dense) == 1:
        return {}

    def timed(call: Call) -> float:
        trial.prepare(call)
        return time_call(call) * 1e3

    for call in trial.dense.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in trial.dense}

    def time_all(names: Sequence[str]) -> None:
        for name in names:
            samples[name].append(timed(trial.dense[name]))

    for _ in range(_TRIAL_ROUNDS):
        time_all(list(samples))
    least = {name: min(times) for name, times in samples.items()}
    candidates = [name for name, best in least.items() if best <= _HOPELESS * min(least.values())]
    end = time.perf_counter() + _CHOICE_SECONDS
    while len(samples[candidates[0]]) < _LEAST_ROUNDS_OF_CANDIDATES or time.perf_counter() < end:
        time_all(candidates)
    return {name: Timing.of(times).median for name, times in samples.items()}


def make_cell(group: str, name: str, facts: dict[str, Any], trial: Trial, measured: Measured) -> Cell:
    """Summarise what was measured."""
    dense_s, gated_s = measured.dense_s, measured.gated_s
    dense, gated, ratio = Timing.of(dense_s), Timing.of(gated_s), Ratio.of(dense_s, gated_s)
    return Cell(
        group,
        name,
        facts,
        measured.baseline,
        len(gated_s),
        trial.kept,
        [value * 1e3 for value in dense],
        [value * 1e3 for value in gated],
        list(ratio),
        ratio.value * trial.kept,
        measured.ways_ms,
        trial.missing,
    )
