"""Costs of layers against what the layers do."""

import pytest
import torch
from torch import nn

from gatedkernels.nn.costs import ConvCost, conv_cost, output_size


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": (1, 2)}, {"dilation": 2, "padding": 3}, {"groups": 2}]
)
def test_size_and_cost(options: dict):
    conv = nn.Conv2d(4, 6, (3, 2), **options)
    y = conv(torch.zeros(1, 4, 11, 9))
    size = output_size(conv, (11, 9))
    assert size == tuple(y.shape[2:])
    assert conv_cost("conv", conv, size).full == y.numel() * conv.weight[0].numel()


def test_overhead_is_no_part_of_the_dense_network():
    cost = ConvCost("gate", 2, 3, 5, is_overhead=True)
    assert (cost.full, cost.dense) == (30, 0)


def test_named_padding():
    with pytest.raises(ValueError, match="padding must be numbers, got 'same'"):
        output_size(nn.Conv2d(1, 1, 3, padding="same"), (4, 4))
