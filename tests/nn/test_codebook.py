"""The gate that picks one of a few masks."""

import pytest
import torch

import gatedkernels as gk
from gatedkernels.nn import CodebookGate


@pytest.mark.parametrize("group", [1, 4])
def test_evaluation_takes_the_mask_of_the_largest_logit(group: int):
    gate = CodebookGate(12, 32, masks=5, group=group).eval()
    x = torch.randn(7, 12, 3, 4)
    (mask, weight), (table, codes) = gate(x), gate.decide(x)
    assert table.shape == (5, 32 // group) and torch.equal(codes, gate.logits(x).argmax(1))
    assert torch.equal(mask, gate.masks[codes] >= 0)
    assert torch.equal(weight, mask.float()) and not weight.requires_grad


def test_its_decision_is_what_the_block_takes():
    gate, x = CodebookGate(6, 6, masks=3).eval(), torch.randn(4, 6, 5, 4)
    weights = (torch.randn(6, 6, 3, 3), None, torch.randn(6, 6, 3, 3), None)
    y = gk.ops.coded_block(x, *weights, *gate.decide(x), residual=x)
    assert torch.equal(y, gk.gated_block(x, *weights, gate(x).mask, residual=x))


def test_training_draws_masks_and_passes_gradients_to_both_choices():
    torch.manual_seed(0)
    gate = CodebookGate(12, 32, masks=5)
    mask, weight = gate(torch.randn(64, 12, 3, 4))
    assert torch.equal(weight.detach(), mask.float())
    # One noise for each mask: samples that draw the same one are open alike.
    assert len(mask.unique(dim=0)) <= 5
    (weight * torch.randn(32)).sum().backward()
    for parameter in gate.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("bias", [-2.0, 0.0, 2.0])
def test_masks_start_around_the_bias(bias: float):
    torch.manual_seed(0)
    gate = CodebookGate(4, 512, masks=8, bias_init=bias)
    torch.testing.assert_close(gate.masks.mean(), torch.tensor(bias), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": 0}, "masks must be positive, got 0"),
        ({"group": 5}, "out_channels must be a positive multiple of group=5, got 32"),
        ({"reduction": 0}, "reduction must be positive, got 0"),
    ],
)
def test_what_it_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CodebookGate(12, 32, **arguments)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 12, H, W\)"):
        CodebookGate(12, 32)(torch.randn(2, 3, 4, 4))
