"""Contrastive losses by their formulas, their invariances, and at points whose value is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatedkernels.training.contrastive import (
    deviation,
    info_nce,
    negative_cosine,
    nt_xent,
    queue_nce,
    similarity_distillation,
)


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


def test_info_nce_is_a_cross_entropy_over_the_other_view():
    queries, keys = (torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    similar = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / 0.2
    expected = 2 * 0.2 * -similar.log_softmax(1).diagonal().mean()
    torch.testing.assert_close(info_nce(queries, keys, 0.2).double(), expected, rtol=1e-5, atol=1e-6)


def test_queues_hold_the_negatives():
    queries, keys = (F.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    queue = F.normalize(torch.randn(7, 4), dim=1)
    own = ((queries * keys).sum(1) / 0.2).exp()
    expected = -(own / (own + (queries @ queue.T / 0.2).exp().sum(1))).log().mean()
    torch.testing.assert_close(queue_nce(3 * queries, keys, queue, 0.2), expected)
    # A teacher near temperature 0 knows its own sample alone: the same loss.
    torch.testing.assert_close(similarity_distillation(queries, keys, queue, 0.2, 1e-4), expected)
    with pytest.raises(ValueError, match=r"queue must have shape \(K, 4\), got \(7, 3\)"):
        queue_nce(queries, keys, queue[:, :3])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        similarity_distillation(queries, keys, queue, 0.2, 0)


def test_deviation_tells_collapse():
    assert deviation(torch.randn(2000, 64)) == pytest.approx(1, abs=0.02)
    assert deviation(torch.randn(1, 64).expand(20, 64)) == pytest.approx(0, abs=1e-6)
