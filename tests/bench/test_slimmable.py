"""The loops and networks that widths are measured against compute the same."""

import pytest
import torch

from bench import slimmable
from gatedkernels.training.recipes import make_config


@torch.inference_mode()
def test_every_way_computes_the_same():
    for calls in (slimmable.conv_calls(6, 16, 5, 3), slimmable.linear_calls(6, 4, 16, 24)):
        first, *rest = (call().clone() for call in calls.values())
        for other in rest:
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_networks():
    taken = slimmable.milliseconds(slimmable.network_calls("slimmable_mobilenet_v2", 8, 4, 0.5), 0)
    assert taken.keys() == {"slimmable", "narrow", "slimmable, optimised", "narrow, optimised"}


def test_rows_of_networks_and_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(slimmable, "NETWORKS", [("slimmable_mobilenet_v2", 32, 1, 0.25), ("nothing", 8, 1, 1.0)])
    slimmable.main(["networks", "--seconds", "0.01", "--only", "mobilenet_v2 32 1"])
    assert "| ratio " in capsys.readouterr().out
    small = {"width": 0.125, "hidden": 16, "embedding": 16}
    monkeypatch.setattr(slimmable, "make_config", lambda recipe, **options: make_config(recipe, **options, **small))
    monkeypatch.setattr(slimmable, "ITERATIONS", [[1.0], [1.0, 0.25]])
    slimmable.main(["training", "--batch", "4", "--seconds", "0"])
    first, second = capsys.readouterr().out.splitlines()
    assert "| times 1.000 (1.000 to 1.000) | work 1.0000" in first and "| work 1.0625 |" in second


@torch.inference_mode()
def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(slimmable, "CONVS", [(2, 16, 4, 3)])
    monkeypatch.setattr(slimmable, "LINEARS", [(2, 3, 16, 32)])
    slimmable.main(["--seconds", "0"])
    conv, linear = capsys.readouterr().out.splitlines()
    assert conv.startswith("conv 2 16 4 3 | ours ") and linear.startswith("linear 2 3 16 32 | ours ")
    assert "| least 0.000" in linear and "least" not in conv  # 480 products
    slimmable.main(["--seconds", "0", "--only", "linear 2"])
    assert capsys.readouterr().out.count("\n") == 1


def test_rows_of_mixed_widths(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(slimmable, "MIXED", [("slimmable_mobilenet_v2", 5)])
    slimmable.main(["mixed", "--seconds", "0"])
    assert capsys.readouterr().out.startswith("slimmable_mobilenet_v2 5 | ours ")
