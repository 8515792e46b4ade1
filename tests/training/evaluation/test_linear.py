"""Linear probes on features that are, and are not, linearly separable."""

import pytest
import torch

from gatedkernels.training.evaluation import Features, few_label_accuracy, linear_accuracy


def clusters(count: int, seed: int, scale: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3)[labels] * 4
    return Features(scale * (centres + 0.3 * torch.randn(count, 3, generator=generator)), labels)


def noise(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, 3, generator=generator), torch.arange(count) % 3)


def test_separable_features():
    assert linear_accuracy(clusters(90, 0), clusters(60, 1)) == 1
    assert few_label_accuracy(clusters(90, 0), clusters(60, 1)) == 1


def test_noise_is_guessed():
    assert 0.2 < linear_accuracy(noise(300, 0), noise(300, 1)) < 0.5
    assert 0.2 < few_label_accuracy(noise(300, 0), noise(300, 1)) < 0.5


def test_same_seed_same_result():
    train, test = noise(60, 0), noise(60, 1)
    assert linear_accuracy(train, test) == linear_accuracy(train, test)
    assert few_label_accuracy(train, test) == few_label_accuracy(train, test)


def test_few_labels_ignore_the_scale():
    small = few_label_accuracy(clusters(90, 0, 1e-3), clusters(60, 1, 1e-3))
    assert small == few_label_accuracy(clusters(90, 0), clusters(60, 1))


def test_augmented_features_are_asked_for_in_every_epoch():
    train, seen = clusters(30, 0), []

    def epoch_features(epoch: int) -> torch.Tensor:
        seen.append(epoch)
        return train.values

    linear_accuracy(train, clusters(30, 1), epochs=4, epoch_features=epoch_features)
    assert seen == [0, 1, 2, 3]


def test_too_few_labels():
    with pytest.raises(ValueError, match="labels must be at most the 3 training images of the smallest class, got 5"):
        few_label_accuracy(clusters(9, 0), clusters(9, 1))
