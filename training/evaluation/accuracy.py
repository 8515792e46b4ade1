"""How good a trained backbone is, beside what it should be compared with."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from gatedkernels.nn import ConvCost
from gatedkernels.training.augment import Views, crop_view, plain_view
from gatedkernels.training.config import Measure, TrainConfig
from gatedkernels.training.data import Data
from gatedkernels.training.evaluation.features import Features, extract, pixel_features
from gatedkernels.training.evaluation.knn import knn1_accuracy, knn1_folds_accuracy
from gatedkernels.training.evaluation.linear import few_label_accuracy, linear_accuracy

MEASURES: tuple[Measure, ...] = get_args(Measure)


def accuracies(train: Features, test: Features, measures: Iterable[Measure], *, seed: int = 0) -> dict[str, float]:
    """Measure one representation.

    Args:
        train: Features of the training images.
        test: Features of the test images.
        measures: Any of "knn1", "knn1_folds", "linear" and "linear_5_labels".
        seed: Decides folds, initial weights and drawn labels, alike for every representation.

    Returns:
        The accuracies by name.
    """
    compute = {
        "knn1": lambda: knn1_accuracy(train, test),
        "knn1_folds": lambda: knn1_folds_accuracy(train, test, seed=seed),
        "linear": lambda: linear_accuracy(train, test, seed=seed),
        "linear_5_labels": lambda: few_label_accuracy(train, test, seed=seed),
    }
    return {measure: compute[measure]() for measure in measures}


def evaluate(
    backbone: nn.Module,
    untrained: nn.Module,
    costs: Sequence[ConvCost],
    data: Data,
    config: TrainConfig,
    *,
    measures: Sequence[Measure] = MEASURES,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compare both branches of a trained backbone with an untrained one and with the pixels.

    The untrained backbone is the same network with the same weights as before training, dense, its batch normalisation
    at its initial statistics (mean 0, variance 1). That is the stronger of the two choices: on digits, statistics
    measured on the training images cost it a quarter of its accuracy.

    Args:
        backbone: The trained network.
        untrained: The same before training.
        costs: What its layers cost, from `gatedkernels.nn.gated_flops`.
        data: The images, without augmentation.
        config: The run.
        measures: Which accuracies.
        batch_size: Images at a time.
        device: Where to compute.

    Returns:
        ``accuracy``, by representation and measure, and ``flops``: dense, and executed and kept by the gated branch
        with its evaluation gates, mean over the test images.
    """
    view = plain_view(config.image_size, data.mean, data.std)

    def features(network: nn.Module, branch: Literal["gated", "dense"]) -> tuple[Features, Features]:
        train, test = (
            extract(network, images, view, branch, costs, batch_size=batch_size, device=device)
            for images in (data.train, data.test)
        )
        return train, test

    gated = features(backbone, "gated")
    representations = {
        "pixels": (pixel_features(data.train, view), pixel_features(data.test, view)),
        "random_init": features(untrained, "dense"),
        "dense": features(backbone, "dense"),
        "gated": gated,
    }
    dense_flops, kept = sum(cost.dense for cost in costs), gated[1].kept
    assert kept is not None
    return {
        "accuracy": {
            name: accuracies(train, test, measures, seed=config.seed) for name, (train, test) in representations.items()
        },
        "flops": {"dense": dense_flops, "executed": round(kept * dense_flops), "kept": kept},
    }


def augmented_linear_accuracy(
    backbone: nn.Module,
    branch: Literal["gated", "dense"],
    costs: Sequence[ConvCost],
    data: Data,
    config: TrainConfig,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> float:
    """Run the linear protocol with new crops and flips in each of its 100 epochs, as published.

    This passes all training images through the frozen backbone a hundred times.
    """
    plain = plain_view(config.image_size, data.mean, data.std)
    views = Views(data.train, (crop_view(config.image_size, data.mean, data.std),), config.seed)

    def epoch_features(epoch: int) -> torch.Tensor:
        images = _Epoch(views, epoch)
        return extract(backbone, images, lambda view: view, branch, costs, batch_size=batch_size, device=device).values

    train, test = (
        extract(backbone, images, plain, branch, costs, batch_size=batch_size, device=device)
        for images in (data.train, data.test)
    )
    return linear_accuracy(train, test, seed=config.seed, epoch_features=epoch_features)


class _Epoch:
    """The augmented images of one epoch, already normalised."""

    def __init__(self, views: Views, epoch: int) -> None:
        self.views, self.epoch, self.labels = views, epoch, views.images.labels

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.views[self.epoch, index][0]
