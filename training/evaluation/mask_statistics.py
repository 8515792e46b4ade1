"""What the masks of a trained network look like, in a file that benchmarks can replay.

A kernel that serves several samples at once reads the union of their channels, so the union over small groups of
samples, in the order in which they come and after sorting like to like, decides what such a kernel can gain.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatedkernels.training.augment import Transform
from gatedkernels.training.data import Images
from gatedkernels.training.evaluation.features import batches

GROUP_SIZES = (2, 4, 8)
SORTED_WITHIN = 64
_STORED_SAMPLES = 64


@torch.no_grad()
def collect_masks(
    backbone: nn.Module, images: Images, transform: Transform, *, batch_size: int = 256
) -> dict[str, Tensor]:
    """Run the gated branch and keep the masks, bool, shape (N, C / group), of every gate."""
    device = next(backbone.parameters()).device
    backbone.eval()
    collected: dict[str, list[Tensor]] = {}
    for batch in batches(images, transform, batch_size):
        _, gates = backbone(batch.to(device), branch="gated", return_gates=True)
        for name, gate in gates.items():
            collected.setdefault(name, []).append(gate.mask.cpu())
    return {name: torch.cat(masks) for name, masks in collected.items()}


def union_density(mask: Tensor, size: int) -> float:
    """Average over groups of neighbouring samples: the share of channels that any of the group has open.

    Args:
        mask: Masks, bool, shape (N, C); samples beyond the last whole group are left out.
        size: Samples in a group.
    """
    groups = mask[: len(mask) // size * size].unflatten(0, (-1, size))
    return float(groups.any(dim=1).double().mean())


def similarity_order(mask: Tensor) -> Tensor:
    """Order samples so that neighbours have similar masks: from each to the nearest one that is left.

    Args:
        mask: Masks, bool, shape (N, C).

    Returns:
        Indices of the samples, shape (N,), beginning with 0.
    """
    signs = mask.double() * 2 - 1
    alike = signs @ signs.T
    order, left = [0], torch.ones(len(mask), dtype=torch.bool)
    for _ in range(len(mask) - 1):
        left[order[-1]] = False
        order.append(int(alike[order[-1]].masked_fill(~left, -torch.inf).argmax()))
    return torch.tensor(order)


def gate_statistics(mask: Tensor) -> dict[str, Any]:
    """Describe the masks of one gate.

    Args:
        mask: Masks, bool, shape (N, C), N at least 8.

    Returns:
        ``channels`` (decisions), ``density``, shares ``always_on`` and ``always_off`` of the channels, ``rates`` (how
        often each channel is open) and ``union``: the union density by group size, of samples in order, of samples
        sorted by similarity within batches of 64, and as it would be if channels fired independently at their rates.
    """
    rates = mask.double().mean(dim=0)
    batches_of_masks = mask.split(SORTED_WITHIN)
    ordered = torch.cat([batch[similarity_order(batch)] for batch in batches_of_masks])
    return {
        "channels": mask.shape[1],
        "density": round(float(rates.mean()), 4),
        "always_on": round(float((rates == 1).double().mean()), 4),
        "always_off": round(float((rates == 0).double().mean()), 4),
        "union": {
            "in_order": {str(size): round(union_density(mask, size), 4) for size in GROUP_SIZES},
            "sorted": {str(size): round(union_density(ordered, size), 4) for size in GROUP_SIZES},
            "independent": {str(size): round(float((1 - (1 - rates) ** size).mean()), 4) for size in GROUP_SIZES},
        },
        "rates": [round(rate, 3) for rate in rates.tolist()],
    }


def mask_report(masks: Mapping[str, Tensor], run: Mapping[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """Describe all masks of a network and store some, the same samples for every gate.

    Samples are shuffled first: folders list their images class by class, which no served batch is.

    Args:
        masks: From :func:`collect_masks`.
        run: What the network was trained on and for how long.
        seed: Decides the order.

    Returns:
        JSON-able: ``run``, ``samples`` (how many were looked at), ``gates`` by name, and ``stored``: ``count`` samples
        whose masks :func:`stored_masks` unpacks.
    """
    samples = len(next(iter(masks.values())))
    if samples < max(GROUP_SIZES):
        raise ValueError(f"masks must come from at least {max(GROUP_SIZES)} samples, got {samples}")
    count = min(samples, _STORED_SAMPLES)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    masks = {name: mask[order] for name, mask in masks.items()}
    packed = {name: base64.b64encode(np.packbits(mask[:count].numpy()).tobytes()) for name, mask in masks.items()}
    return {
        "run": dict(run),
        "samples": samples,
        "sorted_within": SORTED_WITHIN,
        "gates": {name: gate_statistics(mask) for name, mask in masks.items()},
        "stored": {"count": count, "masks": {name: text.decode() for name, text in packed.items()}},
    }


def stored_masks(report: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unpack the masks of a report, bool, shape (count, C), by gate."""
    count = report["stored"]["count"]
    masks = {}
    for name, text in report["stored"]["masks"].items():
        channels = report["gates"][name]["channels"]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count * channels)
        masks[name] = torch.from_numpy(bits.reshape(count, channels)).bool()
    return masks
