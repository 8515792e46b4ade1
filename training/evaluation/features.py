"""Features of images under one branch of a trained backbone, and what they cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedkernels.nn import Branch, ConvCost, kept_fraction
from gatedkernels.training.augment import Transform
from gatedkernels.training.data import Images


@dataclass(frozen=True)
class Features:
    """What a representation says about labelled images.

    Attributes:
        values: Features, float32, shape (N, D), on the CPU.
        labels: Classes, int64, shape (N,).
        kept: Share of the dense network's FLOPs that was executed, mean over the images; None where nothing is gated.
    """

    values: Tensor
    labels: Tensor
    kept: float | None = None


def batches(images: Images, transform: Transform, batch_size: int) -> Iterator[Tensor]:
    """Load images in their order, transformed, shape (N, 3, H, W) each batch."""
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        yield torch.stack([transform(images[index]) for index in range(start, stop)])


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: Images,
    transform: Transform,
    branch: Branch,
    costs: Sequence[ConvCost],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Features:
    """Compute features with the hard gates of evaluation.

    Args:
        backbone: Called as ``backbone(x, branch=…, return_gates=True)``; left in evaluation mode.
        images: The images.
        transform: Prepares one image.
        branch: Which half of the backbone.
        costs: What its layers cost, from `gatedkernels.nn.gated_flops`.
        batch_size: Images at a time.
        device: Where to compute.

    Returns:
        The features, with the share of the FLOPs kept for the gated branch.
    """
    backbone.eval().to(device)
    values: list[Tensor] = []
    kept = 0.0
    for batch in batches(images, transform, batch_size):
        features, gates = backbone(batch.to(device), branch=branch, return_gates=True)
        values.append(features.float().cpu())
        if branch == "gated":
            kept += float(kept_fraction(costs, gates)) * len(batch)
    return Features(torch.cat(values), images.labels, kept / len(images) if branch == "gated" else None)


def pixel_features(images: Images, transform: Transform) -> Features:
    """Use the normalised pixels themselves as features: the baseline that any training should be compared with."""
    return Features(torch.cat(list(batches(images, transform, 256))).flatten(1), images.labels)
