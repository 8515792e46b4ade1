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
from gatedkernels.ops.ragged.gated import rows
from gatedkernels.ops.ragged.launch import List, channels_dense, convolve, packed_like, plan


class Sides(NamedTuple):
    """How many channels each side may compute, for a mask's lists and for all samples: one side's are zero."""

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
    found = Sides(torch.empty_like(counts), torch.empty_like(counts), *counts.new_empty((2, 1)).unbind())
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
) -> Tensor:
    """The convolution with an out-mask, gated up to a density of ``threshold``, else dense."""
    size, channels = arguments.output_size(x, weight, stride, padding, dilation), weight.shape[0]
    y = x.new_empty((x.shape[0], *size, channels)).permute(0, 3, 1, 2)
    x, weight, lists = channels_dense(x), rows(weight, False), plan(out_mask)
    chosen = sides(lists, channels, channels, threshold)
    window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    # The gated side writes zeros where it lists nothing; the other one comes after it.
    convolve(x, weight, bias, y, outs=List(lists.indices, chosen.gated_inner), **window)
    return convolve(
        x, weight, bias, y, outs=List(None, chosen.dense_outer), gate=out_mask.contiguous(), packed_out=True,
        shared=max(1, x.shape[0]), **window,
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
    """The gated basic block, gated up to a density of ``threshold``, else dense: six launches, of which two compute."""
    inner, outer, together = weight1.shape[0], weight2.shape[0], max(1, x.shape[0])
    size = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
    lists, x = plan(mask), channels_dense(x)
    chosen = sides(lists, inner, outer, threshold)
    weight1, weight2 = rows(weight1, False), rows(weight2, True)
    hidden = packed_like(x, inner, *size)
    y = x.new_empty((x.shape[0], *size, outer)).permute(0, 3, 1, 2)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    first: dict[str, Any] = {"stride": stride, "padding": (1, 1), "relu": True, "packed_out": True}
    second: dict[str, Any] = {"padding": (1, 1), "relu": True, "residual": residual, "packed_out": True}
    convolve(x, weight1, bias1, hidden, outs=List(lists.indices, chosen.gated_inner), **first)
    convolve(
        x, weight1, bias1, hidden, outs=List(None, chosen.dense_inner), gate=mask.contiguous(), shared=together, **first
    )
    ins, outs = List(lists.indices, chosen.gated_inner), List(None, chosen.gated_outer)
    convolve(hidden, weight2, bias2, y, ins, outs, packed_in=True, **second)
    return convolve(hidden, weight2, bias2, y, outs=List(None, chosen.dense_outer), shared=together, **second)
