"""Losses that pull a gated network towards a budget."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gatedkernels._checks import check_number, check_type
from gatedkernels.nn.gate import Gate, check_gates


def sparsity_loss(kept: Tensor, target: float, weight: float = 5.0) -> Tensor:
    """Penalise a network that keeps another fraction of its multiply-adds than the target.

    ``weight * (kept - target)²``, two-sided.

    Args:
        kept: The fraction kept, from `kept_fraction`.
        target: The fraction to keep.
        weight: Factor of the loss.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``kept`` is no tensor, or another argument no number.
        ValueError: If the target does not lie in (0, 1].

    Source:
        Li et al., "Dynamic Dual Gating Neural Networks", ICCV 2021.
    """
    check_type("kept", kept, Tensor, "a tensor, from kept_fraction")
    check_number("target", target, above=0, at_most=1)
    check_number("weight", weight)
    return weight * (kept - target) ** 2


def bound_loss(
    gates: Mapping[str, Gate], target: float, epoch: float, decay: float = 0.02, weight: float = 1.0
) -> Tensor:
    """Keep every gate near the target at first, and let go as training goes on.

    With s the open fraction of a gate, t' = √target and p = exp(-decay · epoch): s costs its squared distance from the
    interval [p t', 1 - p + p t'], which is the point t' at epoch 0 and widens to [0, 1]; the loss is the mean over
    gates.

    Args:
        gates: The decisions, as the network returns them.
        target: The fraction to keep.
        epoch: Epochs trained, from 0.
        decay: How fast the interval widens.
        weight: Factor of the loss.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``gates`` are no decisions by key, or another argument is no number.
        ValueError: If there are no gates, the target does not lie in (0, 1], or the epoch or decay is negative.

    Source:
        The authors' code of Li et al., ICCV 2021, and Krishna et al., BMVC 2023; the square root is a left-over of
        gating channels and pixels at once, kept because published results have it.
    """
    check_number("target", target, above=0, at_most=1)
    check_number("weight", weight)
    check_gates(gates)
    if not gates:
        raise ValueError("gates must hold at least one gate, got none")
    for name, value in {"epoch": epoch, "decay": decay}.items():
        check_number(name, value, at_least=0)
    hold = math.exp(-decay * epoch)
    low, high = hold * math.sqrt(target), 1 - hold + hold * math.sqrt(target)
    share = torch.stack([gate.weight.mean() for gate in gates.values()])
    return weight * (torch.relu(low - share) ** 2 + torch.relu(share - high) ** 2).mean()
