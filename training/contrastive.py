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
    _check_temperature(temperature)
    with torch.autocast(queries.device.type, enabled=False):
        both = F.normalize(torch.cat([queries, keys]).float(), dim=1)
        logits = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
        count = len(queries)
        other = torch.arange(2 * count, device=queries.device).roll(count)
        return F.cross_entropy(logits, other)


def info_nce(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    """Contrast each query with all keys, 2 T times the cross-entropy, in float32 whatever the inputs.

    Args:
        queries: Embeddings of one view, after a predictor, shape (N, D), any floating type.
        keys: Embeddings of the other view, same shape; those of other samples are the negatives. Nothing is detached.
        temperature: T.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ or the temperature is not positive.

    Source:
        Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers" (MoCo v3), ICCV 2021.
    """
    _check_pair("queries", queries, "keys", keys)
    _check_temperature(temperature)
    with torch.autocast(queries.device.type, enabled=False):
        logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
        return 2 * temperature * F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


def queue_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Contrast each query with its own key and with earlier keys, in float32 whatever the inputs.

    Args:
        queries: Embeddings of one view, shape (N, D), any floating type.
        keys: Embeddings of the other view, same shape.
        queue: Normalised earlier keys, the negatives, shape (K, D).
        temperature: Divides the cosines.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.

    Source:
        He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, eq. 1.
    """
    _check_pair("queries", queries, "keys", keys)
    _check_temperature(temperature)
    _check_queue(queue, queries)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.float().T], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))


def similarity_distillation(
    students: Tensor, teachers: Tensor, queue: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Compare how similar students and teachers find the same candidates, in float32 whatever the inputs.

    The candidates are the teacher's own embedding of the sample and earlier ones. The loss is the cross-entropy of the
    students' distribution over them under the teachers'.

    Args:
        students: Embeddings that learn, shape (N, D), any floating type.
        teachers: The teacher's embeddings of the same views, same shape.
        queue: The teacher's normalised embeddings of earlier samples, shape (K, D).
        temperature: Of the students' similarities.
        teacher_temperature: Of the teachers'; near 0 only the sample itself counts.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes do not fit or a temperature is not positive.

    Source:
        Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, eq. 5.
    """
    _check_pair("students", students, "teachers", teachers)
    _check_temperature(temperature)
    _check_temperature(teacher_temperature)
    _check_queue(queue, students)
    with torch.autocast(students.device.type, enabled=False):
        students, teachers = F.normalize(students.float(), dim=1), F.normalize(teachers.float(), dim=1)

        def similarities(embeddings: Tensor) -> Tensor:
            return torch.cat([(embeddings * teachers).sum(1, keepdim=True), embeddings @ queue.float().T], dim=1)

        targets = (similarities(teachers) / teacher_temperature).softmax(1)
        return F.cross_entropy(similarities(students) / temperature, targets)


def deviation(embeddings: Tensor) -> Tensor:
    """Return the standard deviation of the normalised embeddings, mean over dimensions, times the root of their number.

    Near 1 where embeddings point everywhere, 0 where all are the same: the sign of collapse.

    Args:
        embeddings: Shape (N, D).

    Source:
        Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1.
    """
    normalised = F.normalize(embeddings.float(), dim=1)
    return normalised.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5


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


def _check_queue(queue: Tensor, queries: Tensor) -> None:
    if queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        raise ValueError(f"queue must have shape (K, {queries.shape[1]}), got {tuple(queue.shape)}")


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
