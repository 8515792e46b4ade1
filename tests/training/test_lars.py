"""LARS against its formula, written out by hand."""

import math

import pytest
import torch

from gatedkernels.training.lars import LARS

LR, DECAY, TRUST, MOMENTUM = 0.5, 0.1, 0.02, 0.9


def scaled(weight: torch.Tensor, gradient: torch.Tensor, decay: float) -> torch.Tensor:
    norm, gradient_norm = math.dist(weight.flatten(), torch.zeros(weight.numel())), float(gradient.norm())
    scale = min(TRUST * norm / (gradient_norm + decay * norm + 1e-8) / LR, 1.0)
    return scale * (gradient + decay * weight)


def optimizer(parameter: torch.Tensor, decay: float = DECAY) -> LARS:
    return LARS([parameter], LR, momentum=MOMENTUM, weight_decay=decay, trust=TRUST)


def test_two_steps_follow_the_formula():
    weight = torch.tensor([[3.0, -4.0]], requires_grad=True)
    expected, velocity = weight.detach().clone(), torch.zeros(1, 2)
    lars = optimizer(weight)
    for gradient in (torch.tensor([[1.0, 2.0]]), torch.tensor([[-0.5, 4.0]])):
        weight.grad = gradient.clone()
        velocity = MOMENTUM * velocity + scaled(expected, gradient, DECAY)
        expected = expected - LR * velocity
        lars.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_small_gradients_are_clipped_to_plain_sgd():
    weight = torch.tensor([[3.0, -4.0]], requires_grad=True)
    weight.grad = torch.tensor([[1e-4, 0.0]])
    optimizer(weight, decay=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0 - LR * 1e-4, -4.0]]))


def test_step_length_is_a_share_of_the_weight_and_ignores_the_gradients_scale():
    steps = []
    for factor in (10.0, 1000.0):
        weight = torch.tensor([[3.0, -4.0]], requires_grad=True)
        weight.grad = factor * torch.tensor([[1.0, 2.0]])
        optimizer(weight, decay=0.0).step()
        steps.append(weight.detach() - torch.tensor([[3.0, -4.0]]))
    torch.testing.assert_close(steps[0], steps[1])
    assert float(steps[0].norm()) == pytest.approx(TRUST * 5, rel=1e-4)


def test_one_dimensional_parameters_take_plain_steps_without_decay():
    bias = torch.tensor([1.0, 2.0], requires_grad=True)
    bias.grad = torch.tensor([10.0, 0.0])
    optimizer(bias).step()
    torch.testing.assert_close(bias.detach(), torch.tensor([1.0 - LR * 10, 2.0]))


def test_zero_weights_can_leave_zero():
    weight = torch.zeros(1, 2, requires_grad=True)
    weight.grad = torch.ones(1, 2)
    optimizer(weight).step()
    torch.testing.assert_close(weight.detach(), torch.full((1, 2), -LR))


def test_parameters_without_gradient_stay():
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer(weight).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_step_leaves_the_groups_as_they_were():
    weight = torch.ones(2, 2, requires_grad=True)
    weight.grad = torch.ones(2, 2)
    lars = optimizer(weight)
    lars.step()
    assert lars.param_groups[0]["weight_decay"] == DECAY
    assert lars.state_dict()["param_groups"][0]["trust"] == TRUST


def test_errors():
    with pytest.raises(ValueError, match="trust must be positive, got 0"):
        LARS([torch.ones(1, requires_grad=True)], 0.1, trust=0)
