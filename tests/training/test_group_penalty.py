"""Group regularisation: weight decay, less of it for later channels."""

import pytest
import torch
from torch import nn

from gatedkernels.training.group_penalty import group_penalty, ramped


def test_without_strength_it_is_weight_decay():
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12, 4))
    group_penalty(net.parameters(), 5e-5, 0).backward()
    for parameter in net.parameters():
        torch.testing.assert_close(parameter.grad, 1e-4 * parameter.detach())


@pytest.mark.parametrize("channels", [8, 16, 20, 5])
def test_later_channels_decay_less(channels: int):
    conv = nn.Conv2d(2, channels, 3)
    group_penalty(conv.parameters(), 0.5, 0.05).backward()
    assert conv.weight.grad is not None and conv.bias is not None and conv.bias.grad is not None
    for k in range(channels):
        weight = 1 - 0.05 * min(k // max(channels // 8, 1), 7)
        torch.testing.assert_close(conv.weight.grad[k], weight * conv.weight.detach()[k])
        torch.testing.assert_close(conv.bias.grad[k], weight * conv.bias.detach()[k])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_frozen_parameters(dtype: torch.dtype):
    weight, frozen = torch.randn(16, 4, 3, 3).to(dtype).requires_grad_(), torch.randn(8).to(dtype)
    penalty = group_penalty([weight, frozen], 0.5, 0.05)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert frozen.grad is None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:2], weight.detach()[:2])


def test_linear_weights_decay_alike():
    weight = torch.randn(16, 4, requires_grad=True)
    group_penalty([weight], 0.5, 0.05).backward()
    torch.testing.assert_close(weight.grad, weight.detach())


@pytest.mark.parametrize(
    ("epoch", "warmup", "expected"),
    [
        (0, 0, 0.0),
        (100, 0, 0.025),
        (200, 0, 0.05),
        (399, 0, 0.05),
        (199, 200, 0.0),
        (200, 200, 0.05),
        (75, 50, 0.05 / 6),
    ],
)
def test_ramp(epoch: int, warmup: int, expected: float):
    assert ramped(epoch, 400, 0.05, warmup) == pytest.approx(expected)


def test_errors():
    parameters = [torch.ones(4)]
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        group_penalty(parameters, -1, 0)
    with pytest.raises(ValueError, match=r"strength must be at least 0 and below 1 / 7, got 0\.2"):
        group_penalty(parameters, 1, 0.2)
    with pytest.raises(ValueError, match="parameters must hold at least one tensor, got none"):
        group_penalty([], 1, 0)
