"""Budget losses against their formulas."""

import math

import pytest
import torch

from gatedkernels.nn import Gate, bound_loss, sparsity_loss


def gates_of(*shares: float) -> dict[str, Gate]:
    """One gate for each share of open channels, of 10."""
    weights = [(torch.arange(10.0) < 10 * share).float().expand(3, 10) for share in shares]
    return {f"g{i}": Gate(w > 0, w.clone().requires_grad_()) for i, w in enumerate(weights)}


def test_sparsity_is_a_square():
    kept = torch.tensor(0.5, requires_grad=True)
    loss = sparsity_loss(kept, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(5 * 0.04)
    assert kept.grad.item() == pytest.approx(2 * 5 * 0.2)
    assert sparsity_loss(torch.tensor(0.1), 0.3, weight=2).item() == pytest.approx(2 * 0.04)


def test_bound_at_epoch_0_pins_every_gate_to_the_root_of_the_target():
    shares = (0.2, 0.5, 0.9)
    expected = sum((share - 0.5) ** 2 for share in shares) / 3
    assert bound_loss(gates_of(*shares), 0.25, epoch=0).item() == pytest.approx(expected)


@pytest.mark.parametrize(("epoch", "hold"), [(0, 1), (50, 0.368), (100, 0.135), (200, 0.018)])
def test_bound_widens(epoch: int, hold: float):
    assert math.exp(-0.02 * epoch) == pytest.approx(hold, abs=5e-4)
    hold, target = math.exp(-0.02 * epoch), math.sqrt(0.3)
    low, high = hold * target, 1 - hold + hold * target
    expected = (low**2 + max(0.0, 1 - high) ** 2 + max(0.0, low - 0.5, 0.5 - high) ** 2) / 3
    assert bound_loss(gates_of(0, 1, 0.5), 0.3, epoch).item() == pytest.approx(expected, abs=1e-6)


def test_bound_pushes_the_right_way():
    gates = gates_of(0.1, 0.9)
    bound_loss(gates, 0.25, epoch=0, weight=3.0).backward()
    assert (gates["g0"].weight.grad < 0).all() and (gates["g1"].weight.grad > 0).all()


@pytest.mark.parametrize("target", [0, -0.1, 1.1])
def test_bad_targets(target: float):
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got"):
        sparsity_loss(torch.tensor(0.5), target)
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got"):
        bound_loss(gates_of(0.5), target, 0)


def test_bad_bounds():
    with pytest.raises(ValueError, match="gates must hold at least one gate"):
        bound_loss({}, 0.3, 0)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        bound_loss(gates_of(0.5), 0.3, -1)
    with pytest.raises(ValueError, match=r"decay must be at least 0, got -0\.1"):
        bound_loss(gates_of(0.5), 0.3, 1, decay=-0.1)
