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


def warmup_line(epoch: int, *, epochs: int, warmup_epochs: int) -> float:
    """Scale the base learning rate: the same warm-up, then a straight line to zero, as US-Net has it.

    Args:
        epoch: The zero-based epoch.
        epochs: Length of the run; at ``epoch == epochs`` the factor is 0.
        warmup_epochs: Epochs until the base learning rate is reached, fewer than ``epochs``.

    Returns:
        The factor, between 0 and 1.
    """
    if epoch < warmup_epochs:
        return warmup_cosine(epoch, epochs=epochs, warmup_epochs=warmup_epochs)
    return (epochs - epoch) / (epochs - warmup_epochs)


def cosine_between(first: float, last: float, epoch: int, epochs: int) -> float:
    """Go from one value to another along half a cosine, as momentum encoders' shares do.

    Args:
        first: The value of epoch 0.
        last: The value at ``epoch == epochs``.
        epoch: The zero-based epoch.
        epochs: Length of the run.

    Returns:
        The value of the epoch.
    """
    return last - (last - first) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
