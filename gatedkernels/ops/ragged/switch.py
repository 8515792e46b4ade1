"""Operations of which the density of their masks chooses one of two sides, on the device.

Both sides are launched, gated and dense, and one of them has nothing to do: a width of zero, at which every program
ends at once. Nothing is copied to the host, and a captured graph follows its masks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops.ragged import switch_kernels
from gatedkernels.ops.ragged.gated import POINT, Block, as_filters, as_images, rows
from gatedkernels.ops.ragged.launch import (
    CONV_FLAG,
    LINEAR_FLAG,
    List,
    channels_dense,
    convolve,
    packed_like,
    plan,
    sums_like,
)


class Sides(NamedTuple):
    """How many channels each side may compute, by list and, hidden by the dense one, for all: one side's are zero."""

    gated_inner: Tensor
    gated_outer: Tensor
    dense_inner: Tensor
    dense_outer: Tensor


def sides(lists: List, channels: int, outer: int, threshold: float) -> Sides:
    """Compare the density of lists with a threshold: above it, the dense side serves.

    Args:
        lists: Of the open channels of every sample.
        channels: How many they are, closed ones included.
        outer: Channels of the result.
        threshold: Part of the channels.
    """
    counts = lists.counts
    assert counts is not None
    by_list = counts.new_empty((3, len(counts))).unbind()
    found = Sides(by_list[0], by_list[1], counts.new_empty(1), by_list[2])
    limit = math.floor(threshold * len(counts) * channels)
    with torch.cuda.device_of(counts):
        switch_kernels.switch_kernel[(1,)](
            counts, *found, len(counts), limit, channels, outer, CHUNK=switch_kernels.CHUNK, num_warps=4
        )
    return found


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threshold: float,
    flag: Any = CONV_FLAG,
) -> Tensor:
    """The convolution with an out-mask, gated up to a density of ``threshold``, else dense."""
    size, channels = arguments.output_size(x, weight, stride, padding, dilation), weight.shape[0]
    y = x.new_empty((x.shape[0], *size, channels)).permute(0, 3, 1, 2)
    x, weight, lists = channels_dense(x), rows(weight, False), plan(out_mask)
    chosen = sides(lists, channels, channels, threshold)
    window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "flag": flag}
    # The gated side writes zeros where it lists nothing; the other one comes after it.
    convolve(x, weight, bias, y, outs=lists._replace(counts=chosen.gated_inner), **window)
    return convolve(
        x, weight, bias, y, outs=List(None, chosen.dense_outer, lists.arrived), gate=out_mask.contiguous(),
        packed_out=True, shared=max(1, x.shape[0]), **window,
    )  # fmt: skip


def gated_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    threshold: float,
) -> Tensor:
    """The gated basic block, gated up to a density of ``threshold``, else dense."""
    block = Block(rows(weight1, False), bias1, rows(weight2, True), bias2, weight2.shape[0])
    return run(block, x, plan(mask), mask, residual, stride, threshold)[0]


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_mask: Tensor, threshold: float) -> Tensor:
    """The linear layer of (masks, tokens of a mask, C) with an out-mask, likewise."""
    y = gated_conv2d(as_images(x), as_filters(weight), bias, out_mask, *POINT[:3], threshold, LINEAR_FLAG)
    return y.squeeze(3).transpose(1, 2)


def run(
    block: Block,
    x: Tensor,
    lists: List,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    threshold: float,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``Block.run`` on two sides: five launches, of which two compute.

    Args:
        block: The weights.
        x: Images (N, C, H, W).
        lists: Of the open hidden channels.
        mask: Bool (N, M / group), what these were made from.
        residual: Added before the last ReLU, or None.
        stride: Of the first convolution.
        threshold: Density above which the dense side serves.
        summed: Leave sums of the result's pixels.
    """
    inner, outer, together = block.weight1.shape[0], block.channels, max(1, x.shape[0])
    size = arguments.output_size(x, block.weight1, stride, (1, 1), (1, 1))
    x, chosen = channels_dense(x), sides(lists, inner, outer, threshold)
    hidden = packed_like(x, inner, *size)
    y = x.new_empty((x.shape[0], *size, outer)).permute(0, 3, 1, 2)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    gate = mask.repeat_interleave(inner // mask.shape[1], 1) if mask.shape[1] < inner else mask.contiguous()
    sums = sums_like(y) if summed else None
    first: dict[str, Any] = {"stride": stride, "padding": (1, 1), "relu": True, "packed_out": True}
    second: dict[str, Any] = {"padding": (1, 1), "relu": True, "residual": residual, "packed_out": True, "sums": sums}
    gated = lists._replace(counts=chosen.gated_inner)
    all_inner, all_outer = (List(None, count, lists.arrived) for count in (chosen.dense_inner, chosen.dense_outer))
    convolve(x, block.weight1, block.bias1, hidden, outs=gated, **first)
    convolve(x, block.weight1, block.bias1, hidden, outs=all_inner, gate=gate, shared=together, **first)
    convolve(hidden, block.weight2, block.bias2, y, gated, List(None, chosen.gated_outer), packed_in=True, **second)
    # Sums are of one sample each; without them all samples share a list.
    together = together if sums is None else 1
    convolve(hidden, block.weight2, block.bias2, y, outs=all_outer, shared=together, **second)
    return y, sums
