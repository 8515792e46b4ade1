"""Trials refuse what computes something else, and know what they keep."""

import pytest
import torch

from bench import trials
from bench.cases import BlockCase, FunctionalCase, NetworkCase
from bench.runner import fastest


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
def test_network():
    case = NetworkCase("gated_resnet18", 0.125, 12, 2, 0.3)
    with trials.network_trial(case, compiled=False) as trial:
        assert trial.gated().shape == (2, 64)
        assert trial.kept == pytest.approx(0.3, abs=0.05)
        assert {"contiguous", "channels-last", "prepacked"} == trial.dense.keys()


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


def test_the_fastest_way_is_the_baseline():
    ways = {"slow": lambda: sum(range(20000)), "fast": lambda: None}
    assert fastest(ways) == "fast"
    assert fastest({"only": lambda: None}) == "only"
