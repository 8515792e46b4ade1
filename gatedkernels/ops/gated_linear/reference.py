"""The definition of ``gated_linear`` and of its gradients, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def along(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of samples (N, C) or tokens (N, …, C) so that it broadcasts over ``x`` (N, …, C)."""
    return mask if mask.ndim == x.ndim else mask.reshape(mask.shape[0], *(1,) * (x.ndim - 2), mask.shape[1])


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros, not products, in the channels that ``mask`` closes."""
    return x if mask is None else torch.where(along(mask, x), x, 0)


def gated_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None
) -> Tensor:
    """``linear(where(in_mask, x, 0), weight, bias)``, zero where ``out_mask`` is closed."""
    return masked(linear(masked(x, in_mask), weight, bias), out_mask)


def gated_linear_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; with ``dense_input_grad`` that of x as if no input were closed."""
    dy = masked(dy, out_mask)
    dx = dweight = dbias = None
    if output_mask[0]:
        dx = dy @ weight
        dx = dx if dense_input_grad else masked(dx, in_mask)
    if output_mask[1]:
        dweight = dy.flatten(0, -2).T @ masked(x, in_mask).flatten(0, -2)
    if output_mask[2]:
        dbias = dy.flatten(0, -2).sum(0)
    return dx, dweight, dbias
