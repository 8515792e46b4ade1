"""Contrastive losses by their formulas, their invariances, and at points whose value is known."""

import math

import pytest
import torch
from torch import Tensor

from gatedkernels.training.contrastive import negative_cosine, nt_xent


def views(samples: int = 5, dims: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, dims), torch.randn(samples, dims)


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_nt_xent_matches_its_formula(temperature: float):
    first, second = views()
    both = [row / row.norm() for row in (*first, *second)]
    total = 0.0
    for a in range(10):
        terms = [math.exp(float(both[a] @ both[b]) / temperature) for b in range(10) if b != a]
        assert len(terms) == 2 * 5 - 1
        total -= math.log(math.exp(float(both[a] @ both[(a + 5) % 10]) / temperature) / sum(terms)) / 10
    assert float(nt_xent(first, second, temperature)) == pytest.approx(total, rel=1e-5)


def test_collapsed_embeddings_cost_the_number_of_others():
    constant = torch.ones(8, 4)
    assert float(nt_xent(constant, constant)) == pytest.approx(math.log(15))


def test_order_views_and_lengths_do_not_matter():
    first, second = views()
    loss = nt_xent(first, second)
    order = torch.randperm(5)
    for other in (nt_xent(second, first), nt_xent(first[order], second[order]), nt_xent(3 * first, 0.5 * second)):
        torch.testing.assert_close(other, loss)


def test_detached_keys_get_no_gradient():
    first, second = (view.requires_grad_() for view in views())
    nt_xent(first, second.detach()).backward()
    assert first.grad is not None and second.grad is None


def test_negative_cosine():
    first, second = views()
    torch.testing.assert_close(negative_cosine(first, 2 * first), torch.tensor(-1.0))
    torch.testing.assert_close(negative_cosine(first, -first), torch.tensor(1.0))
    normal = [view / view.norm(dim=1, keepdim=True) for view in (first, second)]
    distance = (normal[0] - normal[1]).square().sum(1).mean()
    torch.testing.assert_close(negative_cosine(first, second), distance / 2 - 1)


def test_float32_under_autocast():
    first, second = (view.bfloat16() for view in views())
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(first, second).dtype == negative_cosine(first, second).dtype == torch.float32


def test_errors():
    first, second = views()
    with pytest.raises(ValueError, match=r"queries and keys must have one shape \(N, D\), got \(5, 7\) and \(4, 7\)"):
        nt_xent(first, second[:4])
    with pytest.raises(ValueError, match="queries must hold at least 2 samples, got 1"):
        nt_xent(first[:1], second[:1])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nt_xent(first, second, 0)
    with pytest.raises(ValueError, match="predictions and targets must have one shape"):
        negative_cosine(first[0], second[0])
