"""The definition of ``gated_conv2d`` and of its gradients, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (N, C, H, W) with zeros, not products, in the channels that ``mask`` (N, C) closes."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, 0)


def gated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``conv2d(where(in_mask, x, 0), weight, bias)``, zero where ``out_mask`` is closed."""
    y = conv2d(masked(x, in_mask), weight, bias, list(stride), list(padding), list(dilation), groups)
    return masked(y, out_mask)


def gated_conv2d_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; with ``dense_input_grad`` that of x as if no input were closed."""
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        masked(dy, out_mask),
        masked(x, in_mask),
        weight,
        [weight.shape[0]],
        list(stride),
        list(padding),
        list(dilation),
        False,
        [0, 0],
        groups,
        list(output_mask),
    )
    if dx is not None and not dense_input_grad:
        dx = masked(dx, in_mask)
    return dx, dweight, dbias
