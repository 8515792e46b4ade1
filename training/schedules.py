"""Learning-rate schedules, as functions of the epoch."""

import math

_WARMUP_START = 0.01


def warmup_cosine(epoch: int, *, epochs: int, warmup_epochs: int) -> float:
    """Scale the base learning rate: linear warm-up from 1 % of it, then half a cosine to zero.

    Args:
        epoch: The zero-based epoch.
        epochs: Length of the run; at ``epoch == epochs`` the factor is 0.
        warmup_epochs: Epochs until the base learning rate is reached, fewer than ``epochs``.

    Returns:
        The factor, between 0 and 1. With a base of 0.3 the warm-up starts at 0.003, as VICReg-Dual-Gating has it.
    """
    if epoch < warmup_epochs:
        return _WARMUP_START + (1 - _WARMUP_START) * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
