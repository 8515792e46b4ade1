"""Gated operations composed of plans, packings and ragged convolutions: the backend "triton"."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._select import select
from gatedkernels.ops.ragged.configurations import together
from gatedkernels.ops.ragged.groups import equal_groups
from gatedkernels.ops.ragged.groups import similar as similar_plan
from gatedkernels.ops.ragged.groups_reference import similar_groups_reference
from gatedkernels.ops.ragged.launch import (
    ALL,
    AS_THEY_ARE,
    CONV_FLAG,
    LINEAR_FLAG,
    Complete,
    Groups,
    List,
    channels_dense,
    convolve,
    pack,
    packed_like,
    plan,
    sums_like,
    weight_gradient,
)

POINT = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation and groups of a linear layer


def rows(weight: Tensor, listed_inputs: bool) -> Tensor:
    """Weights (K, C, R, S) whose rows are dense: along the outputs if inputs are listed, else along the inputs."""
    if listed_inputs:
        return weight if weight.stride(0) == 1 else weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def conv_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    """The open output channels of every sample, packed; zeros after them."""
    size = arguments.output_size(x, weight, stride, padding, dilation)
    y = packed_like(x, weight.shape[0], *size).zero_()
    return convolve(
        channels_dense(x), rows(weight, False), bias, y, outs=List(index, count),
        stride=stride, padding=padding, dilation=dilation, relu=relu, packed_out=True,
    )  # fmt: skip


def conv_in(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of packed images; what lies beyond count[n] is never read."""
    size = arguments.output_size(packed, weight, stride, padding, dilation)
    return convolve(
        channels_dense(packed), rows(weight, True), bias, _images(packed, weight, size), List(index, count),
        stride=stride, padding=padding, dilation=dilation,
    )  # fmt: skip


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flag: Any = CONV_FLAG,
) -> Tensor:
    """The gated convolution of any geometry without groups."""
    one_group(groups)
    size = arguments.output_size(x, weight, stride, padding, dilation)
    y = _images(x, weight, size)
    ins, x = _listed(x, in_mask)
    outs = ALL if out_mask is None else plan(out_mask)
    return convolve(
        x, rows(weight, ins is not ALL and outs is ALL), bias, y, ins, outs,
        stride=stride, padding=padding, dilation=dilation, packed_in=ins is not ALL,
        shared=x.shape[0] if ins is outs is ALL else 1, flag=flag,
    )  # fmt: skip


def gated_conv2d_backward(
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
    flag: Any = CONV_FLAG,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; with ``dense_input_grad`` that of x as if no input were closed."""
    one_group(groups)
    dx = dweight = dbias = None
    if output_mask[0]:
        # dx is a ragged convolution of dy: its listed inputs are the open outputs, and the other way round. A stride
        # becomes zeros between the pixels of dy; the window is mirrored.
        ins, packed = _listed(dy, out_mask)
        outs = ALL if in_mask is None or dense_input_grad else plan(in_mask)
        turned = [d * (size - 1) - p for d, size, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        dx = convolve(
            packed, rows(weight.transpose(0, 1), ins is not ALL and outs is ALL), None, _images(x, None, x.shape[2:]),
            ins, outs, padding=turned, dilation=dilation, spread=stride, mirrored=True, packed_in=ins is not ALL,
            shared=x.shape[0] if ins is outs is ALL else 1, flag=flag,
        )  # fmt: skip
    if output_mask[1]:
        wide = weight_gradient(dy, x, weight, in_mask, out_mask, stride, padding, dilation, flag)
        dweight = wide.to(weight.dtype)
    if output_mask[2]:
        open_dy = dy if out_mask is None else select(dy, out_mask[:, :, None, None])
        dbias = open_dy.sum((0, 2, 3))
    return dx, dweight, dbias


def gated_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    shared: int = 1,
    similar: bool = False,
) -> Tensor:
    """The gated basic block in three launches, if x, residual and weights have their rows dense: plan, out, in.

    With ``shared`` above 1 so many samples share the union of their lists: weights are fetched once for all of them,
    and what only some of them keep is computed for all and zero for the others. These are neighbours in the batch, or
    with ``similar`` samples of similar masks, wherever they are.
    """
    shared = max(1, min(shared, x.shape[0]))
    gate = None if shared == 1 else mask.contiguous()
    block = Block(rows(weight1, False), bias1, rows(weight2, True), bias2, weight2.shape[0])
    if similar and shared > 1:
        found = similar_plan(mask, shared)
        if found is not None:
            groups, complete = found.groups, found.complete
            return block.run(x, found.lists, residual, stride, shared, groups, gate, complete=complete)[0]
        groups = Groups(similar_groups_reference(mask, shared))
        return block.run(x, plan(mask, shared, groups.order), residual, stride, shared, groups, gate)[0]
    return block.run(x, plan(mask, shared), residual, stride, shared, gate=gate)[0]


def coded_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    table: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    shared: int | None = None,
) -> Tensor:
    """``gated_block`` where every sample has one of the masks in ``table``: a list a mask, groups of equal samples.

    ``shared`` samples of one code share what is fetched; None: as many as fill a tile.
    """
    if shared is None:
        height, width = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
        shared = together(height * width)
    shared = max(1, min(shared, x.shape[0]))
    block = Block(rows(weight1, False), bias1, rows(weight2, True), bias2, weight2.shape[0])
    return block.run(x, plan(table), residual, stride, shared, equal_groups(codes, len(table), shared))[0]


class Block(NamedTuple):
    """The folded weights of a basic block, rows dense: ``weight1`` along its inputs, ``weight2`` along its outputs."""

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    channels: int

    def run(
        self,
        x: Tensor,
        hidden_list: List,
        residual: Tensor | None,
        stride: Sequence[int],
        shared: int = 1,
        groups: Groups = AS_THEY_ARE,
        gate: Tensor | None = None,
        summed: bool = False,
        complete: Complete | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Two launches: the listed hidden channels, packed, and the outputs from these; ``summed``: with their sums.

        ``complete`` completes the list, see `convolve`.
        """
        size = arguments.output_size(x, self.weight1, stride, (1, 1), (1, 1))
        hidden = convolve(
            channels_dense(x), self.weight1, self.bias1, packed_like(x, self.weight1.shape[0], *size),
            outs=hidden_list, stride=stride, padding=(1, 1), relu=True, packed_out=True,
            shared=shared, groups=groups, gate=gate, complete=complete,
        )  # fmt: skip
        y = x.new_empty((x.shape[0], *size, self.channels)).permute(0, 3, 1, 2)
        if residual is not None and residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
        sums = sums_like(y) if summed else None
        convolve(
            hidden, self.weight2, self.bias2, y, hidden_list,
            padding=(1, 1), relu=True, residual=residual, sums=sums, packed_in=True, shared=shared, groups=groups,
        )  # fmt: skip
        return y, sums


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None
) -> Tensor:
    """The gated linear layer of (masks, tokens of a mask, C): a 1×1 convolution of images one pixel wide."""
    y = gated_conv2d(as_images(x), as_filters(weight), bias, in_mask, out_mask, *POINT, LINEAR_FLAG)
    return y.squeeze(3).transpose(1, 2)


def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, likewise."""
    dx, dweight, dbias = gated_conv2d_backward(
        as_images(dy), as_images(x), as_filters(weight), in_mask, out_mask,
        *POINT, dense_input_grad, output_mask, LINEAR_FLAG,
    )  # fmt: skip
    return (
        None if dx is None else dx.squeeze(3).transpose(1, 2),
        None if dweight is None else dweight[:, :, 0, 0],
        dbias,
    )


def as_images(tokens: Tensor) -> Tensor:
    """Tokens (N, T, C) as images one pixel wide."""
    return tokens.transpose(1, 2).unsqueeze(3)


def as_filters(weight: Tensor) -> Tensor:
    """The weight of a linear layer as 1×1 filters."""
    return weight[:, :, None, None]


def _images(x: Tensor, weight: Tensor | None, size: Sequence[int]) -> Tensor:
    """Memory for channels-last images: of the outputs of ``weight``, or of as many channels as ``x``."""
    channels = x.shape[1] if weight is None else weight.shape[0]
    return x.new_empty((x.shape[0], *size, channels)).permute(0, 3, 1, 2)


def _listed(x: Tensor, mask: Tensor | None) -> tuple[List, Tensor]:
    """The list of a mask, and ``x`` packed by it; all channels as they are without one."""
    if mask is None:
        return ALL, channels_dense(x)
    channels = plan(mask)
    return channels, pack(x, channels)


def one_group(groups: int) -> None:
    """Refuse what the kernels do not serve."""
    if groups != 1:
        raise ValueError(f"backend 'triton' serves groups 1, got {groups}")
