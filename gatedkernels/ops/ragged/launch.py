"""Launches of the ragged convolution: shapes in, grids out. Nothing here looks at a value on the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gatedkernels.ops.plan import kernels as plan_kernels
from gatedkernels.ops.ragged import gradient_kernels, kernels
from gatedkernels.ops.ragged.configurations import GRADIENT_PROGRAMS, GRADIENT_TILES, Tile, tile

STEP = kernels.STEP.value


class List(NamedTuple):
    """The channels that count, for each group of ``shared`` neighbouring samples.

    Attributes:
        indices: Int32 (lists, channels), those that count first; None: 0, 1, 2, …
        counts: Int32 (lists,), how many count; None: all.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None


ALL = List()


class Groups(NamedTuple):
    """Which samples share a list, where it is not neighbours in the batch, each group its own.

    Attributes:
        order: Int32 (groups * shared,), the sample at every place; the number of samples where a place is empty.
        lists: Int32 (groups,), the list of every group; None: group g has list g.
    """

    order: Tensor | None = None
    lists: Tensor | None = None


AS_THEY_ARE = Groups()


def plan(mask: Tensor, shared: int = 1, order: Tensor | None = None) -> List:
    """The list of every group of ``shared`` samples, in this order: the channels that any of them keeps."""
    samples, channels = mask.shape
    lists = -(-samples // shared)
    index = mask.new_empty((lists, channels), dtype=torch.int32)
    count = mask.new_empty(lists, dtype=torch.int32)
    if lists:
        chunk = min(plan_kernels.CHUNK, max(triton.next_power_of_2(channels), 16))
        with torch.cuda.device_of(mask):
            plan_kernels.plan_kernel[(lists,)](
                mask, order, index, count, samples, channels, shared, *mask.stride(), CHUNK=chunk, num_warps=4
            )
    return List(index, count)


def channels_dense(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) itself if its channels lie side by side, else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def packed_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Memory for a packed batch (N, channels, height, width), channels-last, with room for whole steps."""
    room = -(-channels // STEP) * STEP
    return x.new_empty((x.shape[0], height, width, room)).permute(0, 3, 1, 2)[:, :channels]


def pack(x: Tensor, channels: List) -> Tensor:
    """The listed channels of every sample of ``x`` (N, C, H, W) side by side, channels-last."""
    samples, width_in, height, width = x.shape
    packed = packed_like(x, width_in, height, width)
    grid = (samples, triton.cdiv(height * width, 64), triton.cdiv(width_in, 32))
    if all(grid):
        with torch.cuda.device_of(x):
            kernels.pack_kernel[grid](
                x, packed, channels.indices, channels.counts, height * width, width, width_in, *x.stride(),
                packed.stride(0), packed.stride(3), PIXELS=64, CHANNELS=32, num_warps=4,
            )  # fmt: skip
    return packed


# PyTorch's flags for how float32 numbers are multiplied.
CONV_FLAG = torch.backends.cudnn.conv  # type: ignore[attr-defined]
LINEAR_FLAG = torch.backends.cuda.matmul


def _precision(x: Tensor, flag: Any) -> str:
    return "tf32" if x.dtype == torch.float32 and flag.fp32_precision == "tf32" else "ieee"


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ins: List = ALL,
    outs: List = ALL,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    spread: Sequence[int] = (1, 1),
    mirrored: bool = False,
    relu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    packed_in: bool = False,
    packed_out: bool = False,
    shared: int = 1,
    groups: Groups = AS_THEY_ARE,
    flag: Any = CONV_FLAG,
    configuration: Tile | None = None,
) -> Tensor:
    """Convolve listed channels of ``x`` into listed channels of ``y``, and return that.

    Args:
        x: Images (N, C, H, W), channels dense.
        weight: (K, C, R, S), any strides; fast if dense along K or C. Or blocks (ceil(K / B), C, R, S, B), contiguous.
        bias: (K,), or None.
        y: Filled; (N, K, H', W'), channels dense. If packed, from ``packed_like``.
        ins: Which channels of ``x`` and of the weights are multiplied.
        outs: Which channels are computed.
        stride: Pixels between windows.
        padding: Zeros around ``x``; may be negative.
        dilation: Pixels between taps.
        spread: ``x`` is taken with ``spread - 1`` zeros between its pixels.
        mirrored: Take the taps in reverse order.
        relu: Apply a ReLU.
        residual: Added before the ReLU, layout of ``y``.
        gate: Bool (N, K), contiguous: listed outputs that are zero all the same.
        packed_in: The listed channels of ``x`` lie side by side, with zeros up to the next step. If not, and ``ins``
            has an index, they lie side by side and nothing behind them is read.
        packed_out: Write the listed channels side by side; else each at its place, and zeros elsewhere.
        shared: Samples of a group, which share a list.
        groups: Which these are; neighbours if it does not say.
        flag: Says how float32 numbers are multiplied.
        configuration: A tile; None: the shipped one.
    """
    samples, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = y.shape
    if groups.order is None:
        shared = min(shared, samples)
    pixels = shared * out_height * out_width
    chosen = configuration or tile(pixels, in_channels, out_channels, x.element_size(), outs.counts is not None)
    tiles = triton.cdiv(pixels, chosen.rows) * triton.cdiv(out_channels, chosen.channels)
    places = samples if groups.order is None else len(groups.order)
    if places * tiles == 0:
        return y
    grid = (triton.cdiv(places, shared) * tiles,)
    assert (x.stride(1) == 1 or in_channels == 1) and (y.stride(1) == 1 or out_channels == 1)
    with torch.cuda.device_of(x):
        kernels.ragged_conv_kernel[grid](
            x, weight, bias, residual, gate, y, ins.indices, ins.counts, outs.indices, outs.counts, *groups,
            samples, shared, height, width, in_channels, out_height, out_width, out_channels,
            x.stride(0), x.stride(2), x.stride(3), *weight.stride()[:4], y.stride(0), y.stride(2), y.stride(3),
            *weight.shape[2:4], *stride, *padding, *dilation, *spread,
            MIRRORED=mirrored, RELU=relu, PACKED_IN=packed_in, PACKED_OUT=packed_out, PRECISION=_precision(x, flag),
            BLOCK=weight.shape[4] if weight.ndim == 5 else 1,
            ROWS=chosen.rows, CHANNELS=chosen.channels, DEPTH=chosen.depth,
            num_warps=chosen.warps, num_stages=chosen.pipeline(ins.indices is not None),
        )  # fmt: skip
    return y


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    flag: Any = CONV_FLAG,
) -> Tensor:
    """The gradient of the weights of ``convolve`` for these masks, in float32 and strides (K, R, S, C).

    Partial sums are added in an order that depends on shapes alone: the same bits every time.
    """
    samples, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = dy.shape
    taps = weight.shape[2] * weight.shape[3]
    chosen = GRADIENT_TILES[x.element_size()]
    tiles = triton.cdiv(out_channels, chosen.outputs) * triton.cdiv(in_channels, chosen.inputs)
    steps = triton.cdiv(samples * out_height * out_width, chosen.rows)
    splits = max(1, min(steps, triton.cdiv(GRADIENT_PROGRAMS, max(tiles * taps, 1))))
    partial = x.new_empty((splits, out_channels, *weight.shape[2:], in_channels), dtype=torch.float32)
    if partial.numel():
        blocked, block = (out_mask, chosen.outputs) if out_mask is not None else (in_mask, chosen.inputs)
        lists = ALL if blocked is None else plan(_keeps_any(blocked, block).T)
        in_mask, out_mask = (None if mask is None else mask.contiguous() for mask in (in_mask, out_mask))
        x, dy = channels_dense(x), channels_dense(dy)
        with torch.cuda.device_of(x):
            gradient_kernels.weight_gradient_kernel[(tiles, taps, splits)](
                x, dy, in_mask, out_mask, lists.indices, lists.counts, partial,
                samples, height, width, in_channels, out_height, out_width, out_channels,
                x.stride(0), x.stride(2), x.stride(3), dy.stride(0), dy.stride(2), dy.stride(3),
                *weight.shape[2:], *stride, *padding, *dilation, BY_OUTPUTS=out_mask is not None,
                PRECISION=_precision(x, flag), OUTPUTS=chosen.outputs, INPUTS=chosen.inputs, ROWS=chosen.rows,
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip
    return partial.sum(0).permute(0, 3, 1, 2)


def _keeps_any(mask: Tensor, block: int) -> Tensor:
    """Bool (N, blocks): whether a sample keeps any channel of a block of neighbouring ones."""
    samples, channels = mask.shape
    blocks = triton.cdiv(channels, block)
    padded = torch.nn.functional.pad(mask, (0, blocks * block - channels))
    return padded.view(samples, blocks, block).any(2)
