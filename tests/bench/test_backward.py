"""The trials of backward passes compute what they claim to."""

import pytest
import torch

from bench import backward
from bench.cases import BackwardCase


@torch.inference_mode()  # as the runner does
@pytest.mark.parametrize("operation", ["gated_conv2d", "gated_block"])
def test_backward(operation):
    with backward.backward_trial(BackwardCase(operation, 16, 6, 2, 0.5)) as trial:
        assert trial.kept == 0.5
        assert trial.dense.keys() == {"contiguous", "channels-last"}
        for call in (trial.gated, trial.gated, *trial.dense.values()):
            assert call().shape == (2, 16, 6, 6)


def test_a_wrong_backward_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    right = backward.gated_conv2d
    monkeypatch.setattr(backward, "gated_conv2d", lambda x, *args, **options: right(x * 1.01, *args, **options))
    with (
        pytest.raises(RuntimeError, match="backward of gated_conv2d must compute"),
        backward.backward_trial(BackwardCase("gated_conv2d", 8, 6, 2, 0.5)),
    ):
        pass
