"""Interleaved measuring, its summaries and bounds."""

import time

import pytest
import torch

from gatedkernels.reporting.timing import Ratio, Timing, interleave, use_threads


def test_timing_is_median_and_quartiles():
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="samples must hold at least one time, got none"):
        Timing.of([])


def test_every_round_times_everybody_warm_and_in_turn():
    order: list[str] = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, warmup=1)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}
    assert "".join(order) == "ab" + "aabb" * 4


def test_seconds_bound_the_measuring_from_both_sides():
    start = time.perf_counter()
    samples = interleave({"nap": lambda: time.sleep(0.001)}, seconds=0.1, warmup=0)
    assert time.perf_counter() - start >= 0.1
    assert all(seconds >= 0.001 for seconds in samples["nap"])
    assert len(interleave({"nap": lambda: time.sleep(0.001)}, seconds=1e-9)["nap"]) == 5


def test_measures_without_gradients():
    weight, modes = torch.ones(2, requires_grad=True), []
    interleave({"sum": lambda: modes.append((weight * 2).requires_grad)}, rounds=1)
    assert not any(modes)


@pytest.mark.parametrize(
    ("calls", "options", "message"),
    [
        ({}, {}, "calls must hold at least one function, got none"),
        ({"a": int}, {"seconds": 0}, "seconds must be positive, got 0"),
        ({"a": int}, {"rounds": 0}, "rounds must be positive, got 0"),
    ],
)
def test_bad_arguments(calls, options, message):
    with pytest.raises(ValueError, match=message):
        interleave(calls, **options)


def test_ratio_and_bounds():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 100, generator=generator).tolist()
    ratio = Ratio.of([2 + 0.2 * value for value in noise[0]], [1 + 0.1 * value for value in noise[1]])
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(2, rel=0.05)
    assert ratio.high - ratio.low < 0.1
    assert Ratio.of([2.0] * 9, [1.0] * 9) == (2, 2, 2)
    with pytest.raises(ValueError, match="slow and fast must come from the same rounds, got 2 and 1 times"):
        Ratio.of([1.0, 2.0], [1.0])


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with use_threads(1) as used:
        assert used == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with use_threads(None) as used:
        assert used == before
    with pytest.raises(ValueError, match="threads must be positive or None, got 0"), use_threads(0):
        pass
