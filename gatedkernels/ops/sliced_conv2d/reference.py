"""The definition of ``sliced_conv2d`` with a width for every sample: a gated convolution whose masks are prefixes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_backward_reference, gated_conv2d_reference


def prefix(width: Tensor | None, channels: int) -> Tensor | None:
    """The mask (N, channels) that opens the first ``width`` (N,) channels of every sample."""
    return None if width is None else torch.arange(channels, device=width.device) < width[:, None]


def sliced_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None, *geometry: Any
) -> Tensor:
    """``conv2d`` of each sample's first ``in_width`` channels; zeros behind its first ``out_width`` ones."""
    masks = prefix(in_width, x.shape[1]), prefix(out_width, weight.shape[0])
    return gated_conv2d_reference(x, weight, bias, *masks, *geometry)


def sliced_conv2d_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias."""
    masks = prefix(in_width, x.shape[1]), prefix(out_width, weight.shape[0])
    return gated_conv2d_backward_reference(dy, x, weight, *masks, stride, padding, dilation, groups, False, output_mask)
