"""Losses between the embeddings of two views: relative distances (contrastive) and absolute ones."""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(queries: Tensor, keys: Tensor, temperature: float = 0.5) -> Tensor:
    """Contrast each sample's two embeddings with every other one of both sets, in float32 whatever the inputs.

    With Z the normalised queries and keys, 2 N rows in all, the mean over all rows a, whose other view is a⁺, of

        -log(exp(z_a · z_a⁺ / T) / Σ_{b ≠ a} exp(z_a · z_b / T))

    Negatives are thus pairs within a set as well as across. Nothing is detached: detach the keys that come from a
    teacher.

    Args:
        queries: Embeddings of one view, shape (N, D), N at least 2, any floating type.
        keys: Embeddings of the other view, same shape.
        temperature: T, 0.5 in SimCLR's and US3L's runs on CIFAR.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ, there are fewer than two samples, or the temperature is not positive.

    Source:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), ICML 2020, eq. 1.
    """
    _check_pair("queries", queries, "keys", keys)
    if len(queries) < 2:
        raise ValueError(f"queries must hold at least 2 samples, got {len(queries)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):
        both = F.normalize(torch.cat([queries, keys]).float(), dim=1)
        logits = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
        count = len(queries)
        other = torch.arange(2 * count, device=queries.device).roll(count)
        return F.cross_entropy(logits, other)


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean cosine of paired embeddings: the distance that BYOL, SimSiam and US3L's distillation lower.

    On unit vectors it is half their squared distance less one. In float32 whatever the inputs; nothing is detached.

    Args:
        predictions: Shape (N, D), any floating type.
        targets: Same shape.

    Returns:
        A scalar, from -1 (all alike) to 1.

    Raises:
        ValueError: If shapes differ.

    Source:
        Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, eq. 1.
    """
    _check_pair("predictions", predictions, "targets", targets)
    with torch.autocast(predictions.device.type, enabled=False):
        return -F.cosine_similarity(predictions.float(), targets.float(), dim=1).mean()


def _check_pair(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    if first.ndim != 2 or first.shape != other.shape:
        shapes = f"{tuple(first.shape)} and {tuple(other.shape)}"
        raise ValueError(f"{name} and {other_name} must have one shape (N, D), got {shapes}")
