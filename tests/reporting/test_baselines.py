"""Dense baselines: all of them right, and a stated reason where one is missing."""

import pytest
import torch

from gatedkernels import optimize
from gatedkernels.reporting.baselines import Baselines, check_same, dense_baselines, masked_baseline, verify
from gatedkernels.reporting.twins import build_twin


def test_every_way_computes_the_same(gated):
    module, x = gated
    dense = dense_baselines(module, x, compiled=False)
    assert list(dense.calls) == ["contiguous", "channels-last", "prepacked"]
    assert dense.eager == ("contiguous", "channels-last")
    assert dense.missing == {}
    verify(build_twin(module, gated=True), {"optimised": optimize(module, x), "itself": module}, dense, x)


@pytest.mark.slow
def test_compiled_and_frozen(build):
    module, x = build("basic")
    for batch in (1, 3):
        dense = dense_baselines(module, x[:batch])
        assert dense.missing == {}
        with torch.inference_mode():
            torch.testing.assert_close(dense.calls["compiled"](), dense.calls["contiguous"](), rtol=1e-4, atol=1e-4)


def test_a_missing_compiler_is_said(build, monkeypatch: pytest.MonkeyPatch):
    def broken(*args, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    module, x = build("basic")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"lack torch.compile: torch.compile failed: no C\+\+ compiler$"):
        dense = dense_baselines(module, x)
    assert "compiled" not in dense.calls
    assert dense.missing == {"compiled": "torch.compile failed: no C++ compiler"}


def test_no_prepacking_in_other_dtypes(build):
    module, x = build("basic")
    dense = dense_baselines(module.to(torch.float64), x.to(torch.float64), compiled=False)
    assert dense.missing == {"prepacked": "prepacked convolutions need float32 or bfloat16 on the CPU"}


@torch.no_grad()
def test_masked_baseline(gated):
    module, x = gated
    network, call = masked_baseline(module, x)
    assert any(getattr(part, "is_gate", False) for part in network.modules())
    torch.testing.assert_close(call(), module(x), rtol=1e-4, atol=1e-4)


def test_verify_refuses_wrong_networks(build):
    module, x = build("resnet18")
    reference, fast = build_twin(module, gated=True), optimize(module, x)
    dense = dense_baselines(module, x, compiled=False)
    wrong = Baselines({"wrong": lambda: dense.calls["contiguous"]() * 1.01}, (), {})
    with pytest.raises(
        RuntimeError, match=r"wrong must compute what it is compared with, got a relative error of 0\.01"
    ):
        verify(reference, {}, wrong, x)
    with torch.no_grad():
        fast.get_submodule("layer3.1").bias2 += 0.1
    with pytest.raises(RuntimeError, match="fast must compute what it is compared with"):
        verify(reference, {"fast": fast}, dense, x)


@pytest.mark.parametrize("got", [torch.full((4,), torch.nan), torch.ones(4, 1), torch.tensor([1.0, 1.0, 1.0, 1.001])])
def test_check_same_refuses(got):
    with pytest.raises(RuntimeError, match="this must compute"):
        check_same("this", got, torch.ones(4))


def test_check_same_knows_rounding():
    want = torch.randn(1000)
    check_same("float32", want * (1 + 1e-6), want)
    check_same("bfloat16", want.to(torch.bfloat16), want.to(torch.bfloat16) * 1.01)
    check_same("zeros", torch.zeros(3), torch.zeros(3))
