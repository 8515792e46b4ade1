"""How good a slimmable backbone is at each width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gatedkernels.nn import SlimmableBatchNorm2d, calibrate_norms, width
from gatedkernels.training.augment import Transform, plain_view
from gatedkernels.training.config import Measure, SlimmableConfig
from gatedkernels.training.data import Data, Images
from gatedkernels.training.evaluation.accuracy import MEASURES, accuracies
from gatedkernels.training.evaluation.features import Features, batches, pixel_features


def evaluate_widths(
    backbone: nn.Module,
    untrained: nn.Module,
    data: Data,
    config: SlimmableConfig,
    widths: Sequence[float],
    *,
    classifier: nn.Module | None = None,
    measures: Sequence[Measure] = MEASURES,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure a trained backbone at each width, beside an untrained one at the same width and the pixels.

    First the batch normalisations of both get statistics for each width: the average over the training images, once and
    without augmentation (the paper's code takes three passes with augmentation and a momentum of 0.1).

    Args:
        backbone: The trained network, slimmable, with statistics; left calibrated, in evaluation mode.
        untrained: The same before training.
        data: The images, without augmentation.
        config: The run.
        widths: The widths.
        classifier: The one that was trained with the backbone, slimmable; measured as "classifier".
        measures: Which accuracies.
        batch_size: Images at a time.
        device: Where to compute.

    Returns:
        ``accuracy``, that of the pixels by measure, and ``widths``, one row each with ``width``, ``accuracy`` and
        ``random_init``, by measure; a classifier's under the trained network's alone.

    Raises:
        ValueError: If there are no widths or one is out of range.
    """
    view = plain_view(config.image_size, data.mean, data.std)
    for network in (backbone, untrained):
        network.eval().to(device)
        images = (batch.to(device) for _ in widths for batch in batches(data.train, view, batch_size))
        count = -(-len(data.train) // batch_size)
        if any(isinstance(module, SlimmableBatchNorm2d) for module in network.modules()):
            calibrate_norms(network, images, widths, limit=count)

    def scores(network: nn.Module) -> tuple[dict[str, float], Features]:
        train, test = (_extract(network, part, view, batch_size, device) for part in (data.train, data.test))
        return accuracies(train, test, measures, seed=config.seed), test

    rows = []
    for each in widths:
        with width(backbone, each), width(untrained, each):
            (trained, features), (random, _) = scores(backbone), scores(untrained)
        if classifier is not None:
            with width(classifier, each):
                trained["classifier"] = _share_correct(classifier, features)
        rows.append({"width": each, "accuracy": trained, "random_init": random})
    pixels = (pixel_features(data.train, view), pixel_features(data.test, view))
    return {"accuracy": {"pixels": accuracies(*pixels, measures, seed=config.seed)}, "widths": rows}


@torch.no_grad()
def _extract(
    network: nn.Module, images: Images, transform: Transform, batch_size: int, device: torch.device | str
) -> Features:
    """Compute the features of the present width."""
    values = [network(batch.to(device)).float().cpu() for batch in batches(images, transform, batch_size)]
    return Features(torch.cat(values), images.labels)


@torch.no_grad()
def _share_correct(classifier: nn.Module, features: Features) -> float:
    """Classify features of the present width."""
    device = next(classifier.parameters()).device
    predicted = classifier(features.values.to(device)).argmax(1).cpu()
    return float((predicted == features.labels).double().mean())
