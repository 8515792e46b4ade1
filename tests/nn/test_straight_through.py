"""The hard threshold and its lent slope."""

import pytest
import torch

from gatedkernels.nn.straight_through import logistic_noise, straight_through


def test_forward_is_a_threshold_at_zero():
    logits = torch.tensor([-1.0, -1e-20, 0.0, 1e-20, 3.0])
    assert straight_through(logits).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("temperature", [2 / 3, 0.1, 5.0])
def test_gradient_is_that_of_the_sigmoid(temperature: float):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, dtype=torch.float64)
    straight_through(logits, temperature).backward(upstream)
    soft = torch.sigmoid(logits.detach() / temperature)
    torch.testing.assert_close(logits.grad, upstream * soft * (1 - soft) / temperature)


def test_noise_is_logistic_and_float32():
    noise = logistic_noise(torch.empty(200_000, dtype=torch.float16))
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    for threshold in (-2.0, 0.0, 1.0):
        share = (noise < threshold).double().mean().item()
        assert share == pytest.approx(torch.sigmoid(torch.tensor(threshold)).item(), abs=5e-3)
