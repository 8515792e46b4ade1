"""Masks set from outside: exact, reproducible, in turn."""

import pytest
import torch
from torch import Tensor, nn

from gatedkernels import optimize
from gatedkernels.nn import Gate, GatedBasicBlock, GatedBottleneck, fix_gates


class Net(nn.Module):
    def __init__(self, group: int = 1):
        super().__init__()
        self.first = GatedBasicBlock(8, 16, group=group)
        self.second = GatedBottleneck(16, 16, group=group)

    def forward(self, x: Tensor) -> list[Gate]:
        y, gate = self.first(x, return_gate=True)
        _, gates = self.second(y, return_gate=True)
        return [gate, *gates]


class Mask(nn.Module):
    """A gate of an optimised model: same name, returns a mask."""

    is_gate = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 16, dtype=torch.bool)


X = torch.randn(4, 8, 5, 5)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("density", [0, 0.3, 0.5, 0.77, 1])
def test_exact_number_of_open_channels(density: float, group: int):
    net = Net(group).eval()
    with fix_gates(net, density):
        for gate in net(X):
            assert gate.mask.sum(1).tolist() == [round(density * (16 // group))] * 4
            assert torch.equal(gate.weight, gate.mask.float())


def test_at_least_16_draws_in_turn():
    net = Net().eval()
    with fix_gates(net, 0.5):
        calls = [net(X)[0].mask for _ in range(32)]
    assert len({tuple(mask.flatten().tolist()) for mask in calls}) == 16
    assert all(torch.equal(a, b) for a, b in zip(calls[:16], calls[16:], strict=True))


def test_a_function_of_seed_name_shape_and_call():
    net = Net().eval()
    with fix_gates(net, 0.5, seed=1):
        first = net(X)
        other = net(X[:2])
    twin = Net().eval()
    with fix_gates(twin, 0.5, seed=1):
        again = twin(torch.randn(4, 8, 9, 9))
    with fix_gates(net, 0.5, seed=2):
        seeded = net(X)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].mask, seeded[0].mask)
    assert not torch.equal(first[0].mask, first[1].mask)
    assert other[0].mask.shape == (2, 16)


def test_gates_that_return_masks():
    net, fast = Net().eval(), nn.Module()
    fast.first = nn.Module()
    fast.first.gate = Mask()
    with fix_gates(net, 0.5), fix_gates(fast, 0.5):
        for _ in range(3):
            assert torch.equal(fast.first.gate(X), net(X)[0].mask)
    assert not fast.first.gate(X).any()


@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_gates_of_a_codebook_have_as_many_masks_as_theirs(density: float):
    block, x = GatedBasicBlock(8, 16, group=2, codebook=3).eval(), torch.randn(40, 8, 5, 5)
    fast = optimize(block, x)
    with fix_gates(block, density), fix_gates(fast, density):
        for _ in range(2):
            mask = block(x, return_gate=True)[1].mask
            assert mask.sum(1).tolist() == [round(density * 8)] * 40
            assert len(mask.unique(dim=0)) == (3 if density == 0.3 else 1)
            assert torch.equal(fast(x, return_gate=True)[1].mask, mask)


def test_density_by_gate():
    net = Net().eval()
    natural = net(X)[1].mask
    with fix_gates(net, {"first": 0.25, "second.gate2": 1.0}):
        first, second, third = net(X)
    assert first.mask.sum(1).tolist() == [4] * 4 and third.mask.all()
    assert second.mask.shape == natural.shape


def test_gates_decide_again_afterwards():
    net = Net().eval()
    before = [gate.mask for gate in net(X)]
    with pytest.raises(RuntimeError), fix_gates(net, 0.0):
        raise RuntimeError
    assert all(torch.equal(a, b.mask) for a, b in zip(before, net(X), strict=True))
    assert not any(module._forward_hooks for module in net.modules())


def test_random_state_is_left_alone():
    net = Net().eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with fix_gates(net, 0.5):
        net(X)
    assert torch.equal(torch.rand(1), expected)


def test_bad_inputs():
    with pytest.raises(ValueError, match="model must contain gates, got Conv2d without"):
        fix_gates(nn.Conv2d(1, 1, 1), 0.5).__enter__()
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 1.5"):
        fix_gates(Net(), 1.5).__enter__()
    with pytest.raises(ValueError, match=r"density must name gates of the model .*, got third"):
        fix_gates(Net(), {"third": 0.5}).__enter__()
