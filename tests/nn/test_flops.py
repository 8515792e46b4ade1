"""Multiply-adds, counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from gatedkernels.nn import ConvCost, Gate, GatedBasicBlock, GatedBottleneck, count_flops, gated_flops, kept_fraction


class Net(nn.Module):
    """A stem, a block of each kind, a head."""

    def __init__(self, group: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.basic = GatedBasicBlock(8, 16, 2, group=group)
        self.bottleneck = GatedBottleneck(16, 4, group=group)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, return_gates: bool = False):
        h, gate = self.basic(self.stem(x), return_gate=True)
        h, (gate1, gate2) = self.bottleneck(h, return_gate=True)
        y = self.head(h.mean((2, 3)))
        gates = {"basic": gate, "bottleneck.gate1": gate1, "bottleneck.gate2": gate2}
        return (y, gates) if return_gates else y


# For images of 9×9: 9×9 stem, 5×5 afterwards.
FIXED = 81 * 9 * 3 * 8 + 25 * 8 * 16 + 16 * 5
DENSE = FIXED + 25 * 9 * (8 * 16 + 16 * 16) + 25 * (16 * 4 + 9 * 4 * 4 + 4 * 16)


def overhead(group: int) -> int:
    return 8 * 2 + 2 * 16 // group + 16 * 4 + 4 * 4 // group + 4 * 1 + 1 * 4 // group


def by_hand(gates: dict[str, Gate], group: int) -> float:
    a, b, c = (group * gates[key].mask.sum(1).double() for key in ("basic", "bottleneck.gate1", "bottleneck.gate2"))
    gated = 25 * 9 * (8 * a + a * 16) + 25 * (16 * b + 9 * b * c + c * 16)
    return FIXED + overhead(group) + gated.mean().item()


@pytest.mark.parametrize("group", [1, 4])
def test_count(group: int):
    net, x = Net(group).eval(), torch.randn(6, 3, 9, 9)
    count = count_flops(net, x)
    assert count.dense == DENSE
    assert count.executed == pytest.approx(by_hand(net(x, return_gates=True)[1], group))
    assert count.kept == count.executed / count.dense


def test_layers():
    count = count_flops(Net(), torch.randn(2, 3, 9, 9))
    layers = {layer.name: layer for layer in count.per_layer}
    assert len(layers) == len(count.per_layer) == 14
    assert (layers["basic.conv1"].in_gate, layers["basic.conv1"].out_gate) == (None, "basic")
    assert (layers["bottleneck.conv2"].in_gate, layers["bottleneck.conv2"].out_gate) == (
        "bottleneck.gate1",
        "bottleneck.gate2",
    )
    assert layers["basic.downsample.0"].dense == layers["basic.downsample.0"].executed == 25 * 8 * 16
    assert (layers["basic.gate.conv2"].dense, layers["basic.gate.conv2"].executed) == (0, 2 * 16)
    assert layers["head"].dense == 80
    assert sum(layer.dense for layer in count.per_layer) == count.dense


def test_kept_fraction_equals_the_count():
    net, x = Net().eval(), torch.randn(6, 3, 9, 9)
    kept = kept_fraction(gated_flops(net, x), net(x, return_gates=True)[1])
    assert kept.item() == pytest.approx(count_flops(net, x).kept, rel=1e-6)


def test_kept_fraction_of_open_gates_is_one_and_the_overhead():
    costs = gated_flops(Net(), torch.randn(1, 3, 9, 9))
    opened = torch.ones(2, 4, dtype=torch.float64)
    gates = {"basic": Gate(opened > 0, torch.ones(2, 16, dtype=torch.float64))}
    gates |= dict.fromkeys(("bottleneck.gate1", "bottleneck.gate2"), Gate(opened > 0, opened))
    assert kept_fraction(costs, gates).item() == pytest.approx(1 + overhead(1) / DENSE, rel=1e-12)


def test_kept_fraction_is_differentiable():
    net = Net().train()
    x = torch.randn(6, 3, 9, 9)
    costs = gated_flops(net, x)
    gates = {
        key: Gate(gate.mask, gate.weight.detach().requires_grad_())
        for key, gate in net(x, return_gates=True)[1].items()
    }
    (gradient,) = torch.autograd.grad(kept_fraction(costs, gates), gates["basic"].weight)
    torch.testing.assert_close(gradient, torch.full((6, 16), 25 * 9 * (8 + 16) / DENSE / 6))


def test_training_flags_and_statistics_stay():
    net = Net().train()
    net.basic.bn1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    count_flops(net, torch.randn(2, 3, 9, 9))
    gated_flops(net, torch.randn(2, 3, 9, 9))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_dense_branch_of_a_block():
    block, x = GatedBasicBlock(8, 16, 2), torch.randn(2, 8, 9, 9)
    count = count_flops(block, x, branch="dense")
    assert count.executed == count.dense == 25 * (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16)
    assert {layer.out_gate for layer in count.per_layer} == {None, "gate"}


def test_plain_networks():
    net = nn.Sequential(
        nn.Conv2d(4, 8, (3, 1), stride=2, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten(2), nn.Linear(16, 5)
    )
    count = count_flops(net, torch.randn(3, 4, 9, 7))
    assert count.dense == count.executed == 16 * 3 * (4 // 2) * 8 + 16 * 8 * 2 + 2 * 16 * 5
    assert [layer.name for layer in count.per_layer] == ["0", "2", "4"]


def test_a_module_may_speak_for_itself():
    class Fast(nn.Module):
        """Like an optimised block: a gate that returns a mask, convolutions that no module runs."""

        def __init__(self):
            super().__init__()
            self.hidden = nn.Conv2d(4, 4, 1)
            self.gate = Decide()

        def forward(self, x: Tensor) -> Tensor:
            self.gate(x)
            return self.hidden(x)

        def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
            return [ConvCost("conv", input_shape[2] * input_shape[3], 4, 6, out_gate="gate")]

    class Decide(nn.Module):
        is_gate = True

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[True, False, False], [True, True, False]])

        def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
            return [ConvCost("", 1, 4, 3, is_overhead=True)]

    count = count_flops(nn.Sequential(Fast()), torch.randn(2, 4, 5, 5))
    assert [layer.name for layer in count.per_layer] == ["0.conv", "0.gate"]
    assert count.dense == 25 * 24
    assert count.executed == 25 * 4 * (2 + 4) / 2 + 12


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"example must hold at least one sample, got shape \(0, 3, 9, 9\)"):
        count_flops(Net(), torch.randn(0, 3, 9, 9))
    with pytest.raises(ValueError, match="model must run convolutions or linear layers, got ReLU without"):
        count_flops(nn.ReLU(), torch.randn(1, 3))
    costs = gated_flops(Net(), torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="gates must hold every gate of the network, got none for basic, bottleneck"):
        kept_fraction(costs, {})
    with pytest.raises(ValueError, match="costs must name gates, got none that are named"):
        kept_fraction(gated_flops(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 2, 2)), {})
