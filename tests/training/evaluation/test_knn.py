"""Nearest neighbours on points whose neighbours are known."""

import torch

from gatedkernels.training.evaluation import Features, knn1_accuracy, knn1_folds_accuracy
from gatedkernels.training.evaluation.knn import nearest_labels


def test_known_points():
    gallery = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    queries = torch.tensor([[1.0, 1.0], [9.0, 2.0], [1.0, 6.0], [4.0, 4.5]])
    assert nearest_labels(gallery, torch.tensor([5, 6, 7]), queries).tolist() == [5, 6, 7, 5]


def test_distance_is_euclidean_not_angular():
    gallery = torch.tensor([[1.0, 0.0], [10.0, 9.0]])
    assert nearest_labels(gallery, torch.tensor([0, 1]), torch.tensor([[10.0, 1.0]])).tolist() == [1]


def test_many_queries_match_one_by_one():
    generator = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(50, 4, generator=generator), torch.randn(1100, 4, generator=generator)
    labels = torch.arange(50)
    expected = [int((gallery - query).norm(dim=1).argmin()) for query in queries]
    assert nearest_labels(gallery, labels, queries).tolist() == expected


def clusters(count: int) -> Features:
    labels = torch.arange(count) % 4
    generator = torch.Generator().manual_seed(count)
    return Features(10.0 * labels[:, None] + torch.randn(count, 3, generator=generator) * 0.1, labels)


def test_separate_clusters_are_classified():
    assert knn1_accuracy(clusters(40), clusters(20)) == 1
    assert knn1_folds_accuracy(clusters(40), clusters(20)) == 1


def test_wrong_labels_count():
    train, test = clusters(40), clusters(20)
    shifted = Features(test.values, torch.where(torch.arange(20) < 5, (test.labels + 1) % 4, test.labels))
    assert knn1_accuracy(train, shifted) == 0.75
