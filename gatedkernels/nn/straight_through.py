"""A hard threshold forward, the slope of a sigmoid backward."""

from typing import Any

import torch
from torch import Tensor

from gatedkernels._checks import check_number


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, temperature: float) -> Tensor:
        return (logits >= 0).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        logits, ctx.temperature = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        soft = torch.sigmoid(logits / ctx.temperature)
        return doutput * soft * (1 - soft) / ctx.temperature, None


def straight_through(logits: Tensor, temperature: float = 2 / 3) -> Tensor:
    """Threshold logits at zero, with the gradient of ``sigmoid(logits / temperature)``.

    The binary concrete relaxation, straight through, of channel gates (Li et al., "Dynamic Dual Gating Neural
    Networks", ICCV 2021): a value is 1 where its logit, noise included, is at least 0, which is where its sigmoid is
    at least one half.

    Args:
        logits: Any shape, floating point.
        temperature: Width of the sigmoid that lends its slope.

    Returns:
        Zeros and ones, shape and dtype of ``logits``.

    Raises:
        TypeError: If ``logits`` are no floating tensor or the temperature is no number.
        ValueError: If the temperature is not positive.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating tensor, got {got}")
    check_number("temperature", temperature, above=0)
    return _StraightThrough.apply(logits, temperature)


def logistic_noise(like: Tensor) -> Tensor:
    """Draw standard logistic noise of a tensor's shape, always in float32.

    The difference of two Gumbel variables; in float16 the guard against ``log(0)`` would underflow.
    """
    uniform = torch.rand(like.shape, dtype=torch.float32, device=like.device)
    return torch.log(uniform + 1e-8) - torch.log(1 - uniform + 1e-8)
