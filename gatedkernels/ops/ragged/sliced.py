"""Sliced operations on the ragged convolution, whose lists are counts alone: the backend "triton"."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._select import select
from gatedkernels.ops.ragged.gated import POINT, as_filters, as_images, one_group, rows
from gatedkernels.ops.ragged.launch import (
    ALL,
    CONV_FLAG,
    LINEAR_FLAG,
    List,
    channels_dense,
    convolve,
    weight_gradient,
)
from gatedkernels.ops.sliced_conv2d.reference import prefix


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flag: Any = CONV_FLAG,
) -> Tensor:
    """One launch: nothing is planned, packed or gathered, and widths stay on the device."""
    one_group(groups)
    size = arguments.output_size(x, weight, stride, padding, dilation)
    ins, outs = _counts(in_width, x.shape[1]), _counts(out_width, weight.shape[0])
    return convolve(
        channels_dense(x), rows(weight, False), bias, _images(x, weight.shape[0], size), ins, outs,
        stride=stride, padding=padding, dilation=dilation, shared=_shared(x, ins, outs), flag=flag,
    )  # fmt: skip


def sliced_conv2d_backward(
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
    flag: Any = CONV_FLAG,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias: that of x is the same launch with the widths exchanged."""
    one_group(groups)
    dx = dweight = dbias = None
    if output_mask[0]:
        ins, outs = _counts(out_width, weight.shape[0]), _counts(in_width, x.shape[1])
        turned = [d * (size - 1) - p for d, size, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        dx = convolve(
            channels_dense(dy), rows(weight.transpose(0, 1), False), None, _images(x, x.shape[1], x.shape[2:]),
            ins, outs, padding=turned, dilation=dilation, spread=stride, mirrored=True,
            shared=_shared(x, ins, outs), flag=flag,
        )  # fmt: skip
    in_mask, out_mask = prefix(in_width, x.shape[1]), prefix(out_width, weight.shape[0])
    if output_mask[1]:
        wide = weight_gradient(dy, x, weight, in_mask, out_mask, stride, padding, dilation, flag)
        dweight = wide.to(weight.dtype)
    if output_mask[2]:
        there = dy if out_mask is None else select(dy, out_mask[:, :, None, None])
        dbias = there.sum((0, 2, 3))
    return dx, dweight, dbias


def sliced_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    """The sliced linear layer of samples (N, tokens, C): a 1×1 convolution of images one pixel wide."""
    y = sliced_conv2d(as_images(x), as_filters(weight), bias, in_width, out_width, *POINT, LINEAR_FLAG)
    return y.squeeze(3).transpose(1, 2)


def sliced_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, likewise."""
    dx, dweight, dbias = sliced_conv2d_backward(
        as_images(dy), as_images(x), as_filters(weight), in_width, out_width, *POINT, output_mask, LINEAR_FLAG
    )
    return (
        None if dx is None else dx.squeeze(3).transpose(1, 2),
        None if dweight is None else dweight[:, :, 0, 0],
        dbias,
    )


def _counts(width: Tensor | None, channels: int) -> List:
    """The list of a width: a count for every sample and no index."""
    return ALL if width is None else List(counts=width.clamp(0, channels))


def _shared(x: Tensor, ins: List, outs: List) -> int:
    """Samples of a group: everybody where there is one width."""
    return max(1, x.shape[0]) if ins is outs is ALL else 1


def _images(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Memory for channels-last images."""
    return x.new_empty((x.shape[0], *size, channels)).permute(0, 3, 1, 2)
