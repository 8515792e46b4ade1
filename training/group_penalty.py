"""Group regularisation: later channels, which only wide networks use, decay less."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_GROUPS = 8


def ramped(epoch: int, epochs: int, strength: float = 0.05, warmup_epochs: int = 0) -> float:
    """Return how much less each group decays than the one before it: none in warm-up, all of it from half the run on.

    Args:
        epoch: The zero-based epoch.
        epochs: Length of the run.
        strength: The value from half the run on.
        warmup_epochs: Epochs without.
    """
    half = epochs / 2
    if epoch < warmup_epochs:
        return 0.0
    if epoch >= half:
        return strength
    return strength * (epoch - warmup_epochs) / (half - warmup_epochs)


def group_penalty(parameters: Iterable[Tensor], weight: float, strength: float) -> Tensor:
    """Return the weighted squares of all parameters, those of later channels weighing less.

    Output channels of convolutions, and the elements of biases and normalisations, form eight groups in order; group i
    weighs ``weight * (1 - strength * i)``. Weights of linear layers weigh the same throughout. It takes the place of
    weight decay: with ``strength`` 0 its gradient is that of a decay of ``2 * weight``.

    Args:
        parameters: At least one tensor.
        weight: Weight of the first group: half the weight decay that is meant.
        strength: How much less each group weighs than the one before it, below 1 / 7.

    Returns:
        A scalar.

    Raises:
        ValueError: If there are no parameters, or a number is out of range.

    Source:
        Cao et al., US3L, CVPR 2023 (the authors' code).
    """
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    if not 0 <= strength < 1 / (_GROUPS - 1):
        raise ValueError(f"strength must be at least 0 and below 1 / {_GROUPS - 1}, got {strength}")
    tensors = list(parameters)
    if not tensors:
        raise ValueError("parameters must hold at least one tensor, got none")
    return _Penalty.apply(weight, strength, *tensors)


class _Penalty(torch.autograd.Function):
    """The penalty with the gradient written out: autograd's passes over all weights four times as often."""

    @staticmethod
    def forward(ctx: Any, weight: float, strength: float, *parameters: Tensor) -> Tensor:
        """Add up the squares."""
        ctx.weight, ctx.strength = weight, strength
        ctx.save_for_backward(*parameters)
        return weight * torch.stack([_weighted_squares(parameter, strength) for parameter in parameters]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply each parameter by twice its weight."""
        scale = 2 * ctx.weight * gradient
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(_times(scale, parameter, ctx.strength) if wants else None for parameter, wants in wanted)


def _factors(parameter: Tensor, strength: float) -> Tensor | None:
    """What the rows of a parameter weigh, float32; None: all the same."""
    if parameter.ndim == 2 or strength == 0:
        return None
    channels = torch.arange(len(parameter), device=parameter.device)
    group = (channels // max(len(parameter) // _GROUPS, 1)).clamp(max=_GROUPS - 1)  # the last takes what is left over
    return 1 - strength * group.float()


def _weighted_squares(parameter: Tensor, strength: float) -> Tensor:
    factors = _factors(parameter, strength)
    if factors is None:
        return torch.linalg.vector_norm(parameter.float()).square()
    if parameter.ndim == 1:
        return parameter.float().square().dot(factors)
    rows = list(range(1, parameter.ndim))
    return torch.linalg.vector_norm(parameter.float(), dim=rows).square().dot(factors)


def _times(scale: Tensor, parameter: Tensor, strength: float) -> Tensor:
    factors = _factors(parameter, strength)
    by_row = scale if factors is None else (scale * factors).view(-1, *(1,) * (parameter.ndim - 1))
    return parameter * by_row.to(parameter.dtype)
