"""VICReg by its formula, by its invariances, and at the points whose value is known."""

import pytest
import torch
from torch import Tensor

from gatedkernels.training.losses import VICRegLoss, covariance_term, invariance_term, variance_term


def vicreg_by_loops(first: Tensor, second: Tensor) -> float:
    """The formula, entry by entry."""
    num_samples, num_dims = first.shape
    total = 25 * sum((a - b) ** 2 for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    total /= num_samples * num_dims
    for view in (first, second):
        centred = (view - view.mean(dim=0)).tolist()
        covariance = [
            [sum(row[i] * row[j] for row in centred) / (num_samples - 1) for j in range(num_dims)]
            for i in range(num_dims)
        ]
        total += 25 * sum(max(0.0, 1 - (covariance[i][i] + 1e-4) ** 0.5) for i in range(num_dims)) / num_dims
        total += sum(covariance[i][j] ** 2 for i in range(num_dims) for j in range(num_dims) if i != j) / num_dims
    return total


def views(num_samples: int = 7, num_dims: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(num_samples, num_dims, generator=generator)
    return first, first + 0.3 * torch.randn(num_samples, num_dims, generator=generator)


def test_loss_matches_formula():
    first, second = views()
    assert float(VICRegLoss()(first, second)["loss"]) == pytest.approx(vicreg_by_loops(first, second), rel=1e-5)


def test_constant_embeddings_cost_the_variance_terms():
    constant = torch.full((8, 16), 0.7)
    assert float(VICRegLoss()(constant, constant)["loss"]) == pytest.approx(25 * 2 * (1 - 0.01))


def test_identical_views_have_no_invariance_term():
    first, _ = views()
    assert float(VICRegLoss()(first, first)["invariance"]) == 0


def test_loss_ignores_the_order_of_samples_and_dimensions():
    first, second = views()
    loss = VICRegLoss()(first, second)["loss"]
    samples, dims = torch.randperm(7), torch.randperm(5)
    torch.testing.assert_close(VICRegLoss()(first[samples][:, dims], second[samples][:, dims])["loss"], loss)


def test_variance_and_covariance_ignore_a_shift():
    first, _ = views()
    for term in (variance_term, covariance_term):
        torch.testing.assert_close(term(first + 3), term(first))
    assert float(invariance_term(first, first + 3)) == pytest.approx(9, rel=1e-5)


def test_decorrelated_embeddings_of_unit_variance_cost_nothing():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(VICRegLoss()(signs, signs)["loss"]) == 0


def test_half_precision_is_computed_in_float32():
    first, second = (view.bfloat16() for view in views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = VICRegLoss()(first, second)["loss"]
    torch.testing.assert_close(loss, VICRegLoss()(first.float(), second.float())["loss"], rtol=0, atol=0)


def test_gradient_is_finite_for_constant_embeddings():
    constant = torch.zeros(4, 3, requires_grad=True)
    VICRegLoss()(constant, constant)["loss"].backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), "must have one shape"),
        (torch.zeros(4), torch.zeros(4), "must have one shape"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2 samples, got 1"),
    ],
)
def test_errors(first: Tensor, second: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        VICRegLoss()(first, second)
