"""The trials of linear layers compute what they claim to."""

import pytest
import torch

from bench import linear
from bench.cases import LinearCase


@torch.inference_mode()
@pytest.mark.parametrize("gated", ["outputs", "inputs"])
@pytest.mark.parametrize("baseline", ["eager", "prepacked"])
def test_linear(gated, baseline):
    with linear.linear_trial(LinearCase(gated, 8, 30, 2, 0.5, baseline)) as trial:
        assert trial.kept == 0.5
        for call in (trial.gated, *trial.dense.values()):
            assert call().shape == (2, 30, 32 if gated == "outputs" else 8)


def test_a_wrong_kernel_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = linear.gated_linear
    monkeypatch.setattr(linear, "gated_linear", lambda *args, **options: right(*args, **options) + 0.01)
    with (
        pytest.raises(RuntimeError, match="gated_linear must compute"),
        linear.linear_trial(LinearCase("inputs", 8, 30, 2, 0.5)),
    ):
        pass
