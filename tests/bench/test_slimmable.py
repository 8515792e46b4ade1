"""The loops and networks that widths are measured against compute the same."""

import pytest
import torch

from bench import slimmable


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


@torch.inference_mode()
def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(slimmable, "CONVS", [(2, 16, 4, 3)])
    monkeypatch.setattr(slimmable, "LINEARS", [(2, 3, 16, 32)])
    slimmable.main(["--seconds", "0"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["conv", "linear"]
