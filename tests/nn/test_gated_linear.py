"""The gated linear layer against the definition, in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import gatedkernels as gk
from gatedkernels.nn import GatedLinear


def random_mask(n: int, channels: int) -> Tensor:
    return torch.rand(n, channels) < 0.5


def along(layer: GatedLinear, values: Tensor, x: Tensor) -> Tensor:
    values = values.repeat_interleave(layer.group, 1)
    return values.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)


def by_definition(layer: GatedLinear, x: Tensor, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
    x = x if in_mask is None else torch.where(along(layer, in_mask, x), x, 0)
    y = linear(x, layer.weight, layer.bias)
    y = y if layer.activation is None else layer.activation(y)
    return y if out_mask is None else torch.where(along(layer, out_mask, y), y, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.Sigmoid()])
@pytest.mark.parametrize("tokens", [(), (30,), (2, 3)], ids=str)
def test_brought_masks(training: bool, activation: nn.Module | None, tokens: tuple[int, ...]):
    layer = GatedLinear(8, 16, gate=False, activation=activation).double().train(training)
    x = torch.randn(3, *tokens, 8, dtype=torch.float64)
    for in_mask in (None, random_mask(3, 8)):
        for out_mask in (None, random_mask(3, 16), torch.zeros(3, 16, dtype=torch.bool)):
            y = layer(x, in_mask=in_mask, out_mask=out_mask)
            torch.testing.assert_close(y, by_definition(layer, x, in_mask, out_mask))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)], ids=str)
def test_own_gate(training: bool, tokens: tuple[int, ...]):
    layer = GatedLinear(8, 16, bias=False, group=4, activation=nn.Sigmoid()).double().train(training)
    x = torch.randn(3, *tokens, 8, dtype=torch.float64)
    y, gate = layer(x, return_gate=True)
    assert gate.mask.shape == (3, 4)
    torch.testing.assert_close(y, by_definition(layer, x, None, gate.mask))


def test_the_gate_looks_at_the_mean_token():
    layer, x = GatedLinear(8, 16).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    gate = layer(x, return_gate=True)[1]
    assert torch.equal(gate.mask, layer(x.mean(1), return_gate=True)[1].mask)


def test_gradients_equal_the_masked_dense_ones():
    """Of two layers, gated between them: gate, weights, and input."""
    up, down = GatedLinear(8, 16, activation=nn.GELU()).double(), GatedLinear(16, 8, gate=False).double()
    dense = copy.deepcopy((up, down))
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 5, 8, dtype=torch.float64)
    torch.manual_seed(3)
    hidden, gate = up(x, return_gate=True)
    down(hidden, in_mask=gate.mask, dense_input_grad=True).backward(upstream)
    torch.manual_seed(3)
    weight = dense[0]._decide(z, None).weight
    by_definition(dense[1], by_definition(dense[0], z, None, None) * weight[:, None], None, None).backward(upstream)
    torch.testing.assert_close(x.grad, z.grad)
    for ours, theirs in zip((up, down), dense, strict=True):
        for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad)
    assert up.gate.conv2.weight.grad.any()


def test_without_gate_and_masks_it_is_a_linear_layer():
    layer, plain = GatedLinear(8, 16, gate=False), nn.Linear(8, 16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    y, gate = layer(x, return_gate=True)
    assert gate is None and torch.equal(y, plain(x))


def test_flops():
    layer, x = GatedLinear(8, 16).eval(), torch.randn(4, 5, 8)
    count = gk.count_flops(layer, x)
    overhead = 8 * 2 + 2 * 16
    assert count.dense == 5 * 8 * 16
    assert count.executed == pytest.approx(5 * 8 * layer(x, return_gate=True)[1].mask.sum(1).double().mean() + overhead)
    with gk.fix_gates(layer, 0.25):
        assert gk.count_flops(layer, x).executed == 5 * 8 * 4 + overhead


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be positive, got 0"),
        ({"group": 5}, "out_features must be a positive multiple of group=5, got 16"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GatedLinear(**{"in_features": 8, "out_features": 16} | arguments)


def test_bad_inputs():
    layer, x = GatedLinear(8, 16), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"x must have shape \(N, \.\.\., 8\), got \(2, 5, 7\)"):
        layer(x[..., :7])
    with pytest.raises(TypeError, match=r"out_mask must be a bool tensor, got torch.float32"):
        layer(x, out_mask=torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"in_mask must have shape \(2, 8\), got \(2, 16\)"):
        layer(x, in_mask=random_mask(2, 16))
