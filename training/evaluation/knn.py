"""Nearest-neighbour classification of frozen features."""

import torch
from torch import Tensor

from gatedkernels.training.evaluation.features import Features

_QUERIES_AT_A_TIME = 512


def nearest_labels(gallery: Tensor, gallery_labels: Tensor, queries: Tensor) -> Tensor:
    """Return for every query the label of the gallery row at the smallest Euclidean distance.

    Args:
        gallery: Features, shape (M, D).
        gallery_labels: Their labels, shape (M,).
        queries: Features, shape (N, D).

    Returns:
        Labels, shape (N,).
    """
    nearest = [torch.cdist(part, gallery).argmin(dim=1) for part in queries.split(_QUERIES_AT_A_TIME)]
    return gallery_labels[torch.cat(nearest)]


def knn1_accuracy(train: Features, test: Features) -> float:
    """Classify each test image as its nearest training image is (k = 1, features as they are, not normalised)."""
    predicted = nearest_labels(train.values, train.labels, test.values)
    return float((predicted == test.labels).double().mean())


def knn1_folds_accuracy(train: Features, test: Features, *, folds: int = 5, seed: int = 0) -> float:
    """Classify all images by cross-validation, which is steadier than one small test set.

    Training and test images are put together and cut into stratified folds; each fold is classified by the others.

    Args:
        train: Features of the training images.
        test: Features of the test images, under the same representation.
        folds: Number of folds.
        seed: Decides the cut.

    Returns:
        The mean accuracy over the folds.
    """
    from sklearn.model_selection import StratifiedKFold

    values, labels = torch.cat([train.values, test.values]), torch.cat([train.labels, test.labels])
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracies = []
    for gallery, queries in splitter.split(values, labels):
        predicted = nearest_labels(values[gallery], labels[gallery], values[queries])
        accuracies.append(float((predicted == labels[queries]).double().mean()))
    return sum(accuracies) / folds
