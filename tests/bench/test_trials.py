"""Trials refuse what computes something else, and know what they keep."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import trials
from bench.cases import BlockCase, FunctionalCase, NetworkCase, PointwiseCase
from bench.runner import make_cell, measure, time_ways
from bench.trials import Trial
from gatedkernels.reporting.baselines import dense_baselines


@torch.inference_mode()
def test_block():
    with trials.block_trial(BlockCase(16, 6, 2, 0.5)) as trial:
        assert trial.gated().shape == trial.dense["prepacked"]().shape == (2, 16, 6, 6)
        assert trial.kept == pytest.approx(0.5, abs=0.01)
        assert trial.kept > 0.5  # the gate's own cost


@torch.inference_mode()
@pytest.mark.parametrize("masks", ["independent", "correlated"])
def test_block_under_other_masks(masks: str):
    with trials.block_trial(BlockCase(16, 6, 2, 0.5, masks)) as trial:
        kept = {trial.gated().count_nonzero().item() for _ in range(4)}
        assert len(kept) > 1
        assert 0.3 < trial.kept < 0.7


@torch.inference_mode()
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_network(stem: str):
    case = NetworkCase("gated_resnet18", 0.125, 12, stem, 2, 0.3)
    with trials.network_trial(case, complete=False) as trial:
        assert trial.gated().shape == (2, 64)
        assert trial.kept == pytest.approx(0.3, abs=0.05)
        assert {"contiguous", "channels-last", "prepacked"} == trial.dense.keys()


@torch.inference_mode()
def test_other_engines_take_part(monkeypatch: pytest.MonkeyPatch):
    def one_right_one_missing(model, x, *, compiled, peers):
        assert compiled and peers
        dense = dense_baselines(model, x, compiled=False)
        calls = dense.calls | {"openvino": dense.calls["contiguous"]}
        return replace(dense, calls=calls, missing={"onnxruntime": "it is not installed"})

    monkeypatch.setattr(trials, "dense_baselines", one_right_one_missing)
    case = NetworkCase("gated_resnet18", 0.125, 12, "cifar", 1, 0.3)
    with trials.network_trial(case) as trial:
        assert {"contiguous", "channels-last", "prepacked", "openvino"} == trial.dense.keys()
        assert trial.missing == {"onnxruntime": "it is not installed"}


def test_a_wrong_engine_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    def wrong(model, x, *, compiled, peers):
        dense = dense_baselines(model, x, compiled=False)
        return replace(dense, calls=dense.calls | {"openvino": lambda: dense.calls["contiguous"]() * 1.01})

    monkeypatch.setattr(trials, "dense_baselines", wrong)
    case = NetworkCase("gated_resnet18", 0.125, 12, "cifar", 3, 0.3)
    with pytest.raises(RuntimeError, match="openvino must compute"), trials.network_trial(case):
        pass


@torch.inference_mode()
def test_cold_blocks_evict(monkeypatch: pytest.MonkeyPatch):
    with trials.block_trial(BlockCase(16, 6, 2, 0.5, cache="cold")) as trial:
        assert trial.prepare is trials.evict_before
    with trials.block_trial(BlockCase(16, 6, 2, 0.5)) as trial:
        assert trial.prepare is trials.settle_before
    called = []
    monkeypatch.setattr(trials, "last_level_cache", lambda: 1 << 20)
    trials._other_things.cache_clear()
    trials.evict_before(lambda: called.append(1))
    assert not called  # it would come back into the caches
    assert trials._other_things().nbytes == 2 << 20
    trials._other_things.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("operation", ["gated_conv2d", "gated_block"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_functional(operation, layout):
    with trials.functional_trial(FunctionalCase(operation, 16, 6, 2, 0.5, layout)) as trial:
        assert trial.kept == 0.5
        for call in (trial.gated, *trial.dense.values()):
            y = call()
            assert y.is_contiguous(
                memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last
            )


@torch.inference_mode()
@pytest.mark.parametrize("gated", ["outputs", "inputs"])
def test_pointwise(gated):
    with trials.pointwise_trial(PointwiseCase(gated, 16, 24, 6, 2, 0.5)) as trial:
        assert trial.kept == 0.5
        assert trial.gated().shape == (2, 24, 6, 6)
        if gated == "outputs":
            assert (trial.gated() == 0).all(-1).all(-1).sum(1).tolist() == [12, 12]


def test_a_wrong_kernel_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    wrong = trials.gated_conv2d
    monkeypatch.setattr(trials, "gated_conv2d", lambda *args, **options: wrong(*args, **options) + 0.01)
    case = FunctionalCase("gated_conv2d", 16, 6, 2, 0.5, "contiguous")
    with pytest.raises(RuntimeError, match="gated_conv2d must compute"), trials.functional_trial(case):
        pass


def test_a_wrong_block_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = trials.optimize

    def optimize(module, example):
        fast = right(module, example)
        fast.weight1[0] = 0
        return fast

    monkeypatch.setattr(trials, "optimize", optimize)
    trials._block.cache_clear()
    with (
        pytest.raises(RuntimeError, match="the optimised block must compute"),
        trials.block_trial(BlockCase(16, 6, 2, 1.0)),
    ):
        pass
    trials._block.cache_clear()


class _Clock:
    """Time passes only when a way runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def way(self, name: str, seconds: float):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


class _Benchmark:
    """What `measure` uses of pytest-benchmark."""

    def pedantic(self, call, setup, rounds, warmup_rounds, iterations):
        times = []
        for _ in range(warmup_rounds + rounds):
            setup()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=times[warmup_rounds:]))


def test_the_fastest_way_is_the_baseline(monkeypatch: pytest.MonkeyPatch):
    clock = _Clock(monkeypatch)
    ways = {"slow": clock.way("slow", 0.012), "fast": clock.way("fast", 0.01), "hopeless": clock.way("hopeless", 0.1)}
    trial = Trial(clock.way("gated", 0.005), ways, 0.5)
    assert time_ways(trial) == {"slow": pytest.approx(12), "fast": pytest.approx(10), "hopeless": pytest.approx(100)}
    assert clock.calls.count("hopeless") == 7  # once to begin with, and three times after it ran
    measured = measure(trial, _Benchmark(), 0.5)
    assert measured.baseline == "fast" and len(measured.gated_s) == len(measured.dense_s) >= 15
    cell = make_cell("network", "name", {}, trial, measured)
    assert (cell.speedup[0], cell.efficiency) == (pytest.approx(2), pytest.approx(1))
    assert cell.ways_ms["slow"] == pytest.approx(12)


def test_the_only_way_is_the_baseline(monkeypatch: pytest.MonkeyPatch):
    clock = _Clock(monkeypatch)
    trial = Trial(clock.way("gated", 0.005), {"only": clock.way("only", 0.01)}, 1.0)
    assert time_ways(trial) == {} and not clock.calls
    assert measure(trial, _Benchmark(), 0.1).baseline == "only"


def test_warm_calls_run_before_they_are_timed(monkeypatch: pytest.MonkeyPatch):
    clock = _Clock(monkeypatch)
    trials.settle_before(clock.way("for ten milliseconds", 0.004))
    trials.settle_before(clock.way("once is enough", 0.1))
    assert clock.calls == [*["for ten milliseconds"] * 3, "once is enough"]


def test_both_sides_are_prepared_alike(monkeypatch: pytest.MonkeyPatch):
    clock = _Clock(monkeypatch)
    dense, gated = clock.way("dense", 0.01), clock.way("gated", 0.005)
    names = {dense: "before dense", gated: "before gated"}
    trial = Trial(gated, {"only": dense}, 1.0, lambda call: clock.calls.append(names[call]))
    measure(trial, _Benchmark(), 0.1)
    rounds = len(clock.calls) // 4
    assert clock.calls == ["before dense", "dense", "before gated", "gated"] * rounds
