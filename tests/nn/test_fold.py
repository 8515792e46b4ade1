"""Folding against convolution, then normalisation."""

import pytest
import torch
from torch import nn

from gatedkernels.nn import fold_norm


def batch_norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, affine=affine).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_equals_convolution_then_norm(bias: bool, affine: bool):
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias).double(), batch_norm(5, affine)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, *fold_norm(conv.weight, conv.bias, norm)), norm(conv(x)))


def test_dtype_and_gradients():
    norm = batch_norm(5)
    weight = torch.randn(5, 3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    folded, bias = fold_norm(weight, None, norm)
    assert folded.dtype == bias.dtype == torch.bfloat16
    folded.sum().backward()
    assert weight.grad is not None and norm.weight.grad is not None
    assert fold_norm(weight, None, None) == (weight, None)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5), nn.GroupNorm(1, 5), nn.BatchNorm2d(5, track_running_stats=False)])
def test_refuses_what_is_not_affine(norm: nn.Module):
    with pytest.raises(ValueError, match="norm must be a batch normalisation that uses running statistics, got"):
        fold_norm(torch.zeros(5, 3, 1, 1), None, norm)
