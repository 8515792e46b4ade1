"""Launches of the ragged convolution: shapes in, grids out. Nothing here looks at a value on the device."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gatedkernels.ops.plan import kernels as plan_kernels
from gatedkernels.ops.ragged import gradient_kernels, kernels, measured, schedule_kernels
from gatedkernels.ops.ragged.configurations import (
    ARRIVED,
    GRADIENT_PROGRAMS,
    GRADIENT_TILES,
    Configuration,
    Shape,
    Tile,
)

STEP, SLOT = kernels.STEP.value, kernels.SLOT.value


class List(NamedTuple):
    """The channels that count, for each group of ``shared`` neighbouring samples.

    Attributes:
        indices: Int32 (lists, channels), those that count first; None: 0, 1, 2, …
        counts: Int32 (lists,), how many count; None: all.
        arrived: Int32 (``ARRIVED``,), zeros: in which convolutions whose reduction is split count its parts, and leave
            zeros behind. What makes lists makes these; None: convolutions make their own, a launch more.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None
    arrived: Tensor | None = None


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
# Completes a list of outputs for a convolution, and returns its list of tiles, if the configuration has one.
Complete = Callable[[Shape, Configuration], Tensor | None]


def plan(mask: Tensor, shared: int = 1, order: Tensor | None = None) -> List:
    """The list of every group of ``shared`` samples, in this order: the channels that any of them keeps."""
    samples, channels = mask.shape
    lists = -(-samples // shared)
    index = mask.new_empty((lists, channels), dtype=torch.int32)
    count = mask.new_empty(lists, dtype=torch.int32)
    arrived = mask.new_empty(ARRIVED, dtype=torch.int32)
    if lists:
        chunk = min(plan_kernels.CHUNK, max(triton.next_power_of_2(channels), 16))
        with torch.cuda.device_of(mask):
            plan_kernels.plan_kernel[(lists,)](
                mask, order, index, count, arrived, samples, channels, shared, *mask.stride(),
                CHUNK=chunk, ARRIVED=ARRIVED, num_warps=4,
            )  # fmt: skip
    return List(index, count, arrived)


def channels_dense(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) itself if its channels lie side by side, else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def packed_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Memory for a packed batch (N, channels, height, width), channels-last, with room for whole steps."""
    room = -(-channels // STEP) * STEP
    return x.new_empty((x.shape[0], height, width, room)).permute(0, 3, 1, 2)[:, :channels]


def sums_like(y: Tensor) -> Tensor:
    """Memory for the sums of each ``SLOT`` neighbouring pixels of images (N, K, H, W): (N, K, slots, 1)."""
    slots = triton.cdiv(y.shape[2] * y.shape[3], SLOT)
    return y.new_empty((y.shape[0], slots, 1, y.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


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
    sums: Tensor | None = None,
    packed_in: bool = False,
    packed_out: bool = False,
    shared: int = 1,
    groups: Groups = AS_THEY_ARE,
    flag: Any = CONV_FLAG,
    complete: Complete | None = None,
    configuration: Configuration | None = None,
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
        sums: Filled with sums of pixels of ``y``, from ``sums_like``: groups are samples, and list all outputs or none.
        packed_in: The listed channels of ``x`` lie side by side, with zeros up to the next step. If not, and ``ins``
            has an index, they lie side by side and nothing behind them is read.
        packed_out: Write the listed channels side by side; else each at its place, and zeros elsewhere.
        shared: Samples of a group, which share a list.
        groups: Which these are; neighbours if it does not say.
        flag: Says how float32 numbers are multiplied.
        complete: Called before the launch: completes ``outs``, and returns the list of tiles if the configuration has
            one. None: ``outs`` is complete, and a launch of its own lists the tiles.
        configuration: Tile and schedule; None: what was measured for such a shape, else the shipped one.

    One launch, but for a list of tiles, and for zeros to count parts in where no list brings them along.
    """
    samples, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = y.shape
    if groups.order is None:
        shared = min(shared, samples)
    places = samples if groups.order is None else len(groups.order)
    precision = _precision(x, flag)
    shape = Shape(
        _LISTED[ins.counts is not None, outs.counts is not None], packed_out and outs.counts is not None,
        "tf32" if precision == "tf32" else str(x.dtype).removeprefix("torch."), math.prod(weight.shape[2:4]),
        math.prod(stride), math.prod(spread), in_channels, out_channels,
        shared * out_height * out_width, triton.cdiv(places, max(shared, 1)),
    )  # fmt: skip
    if shape.groups * shape.pixels * out_channels == 0:
        return y
    assert sums is None or (shared == 1 and groups.order is None)
    assert (x.stride(1) == 1 or in_channels == 1) and (y.stride(1) == 1 or out_channels == 1)

    def run(chosen: Configuration) -> None:
        tile, count = chosen.tile, shape.tiles(chosen.tile)
        tiles = partial = arrived = None
        grid: tuple[int, ...] = (count, chosen.splits)
        if complete is not None:
            tiles = complete(shape, chosen)
        elif chosen.programs:
            tiles = schedule(shape, chosen, samples, shared, ins, outs if packed_out else ALL, groups, x.device)
        if chosen.programs:
            grid = (min(count, chosen.programs * multiprocessors(x.device)),)
        elif chosen.splits > 1:
            partial = x.new_empty((count, chosen.splits, tile.rows, tile.channels), dtype=torch.float32)
            arrived = outs.arrived if ins.arrived is None else ins.arrived
            if arrived is None or len(arrived) < count:
                arrived = x.new_zeros(count, dtype=torch.int32)
        kernels.ragged_conv_kernel[grid](
            x, weight, bias, residual, gate, y, sums, ins.indices, ins.counts, outs.indices, outs.counts, *groups,
            tiles, partial, arrived, samples, shared, height, width, in_channels, out_height, out_width, out_channels,
            x.stride(0), x.stride(2), x.stride(3), *weight.stride()[:4], y.stride(0), y.stride(2), y.stride(3),
            *weight.shape[2:4], *stride, *padding, *dilation, *spread,
            MIRRORED=mirrored, RELU=relu, PACKED_IN=packed_in, PACKED_OUT=packed_out, PRECISION=precision,
            BLOCK=weight.shape[4] if weight.ndim == 5 else 1,
            ROWS=tile.rows, CHANNELS=tile.channels, DEPTH=tile.depth, SPLITS=chosen.splits,
            num_warps=tile.warps, num_stages=tile.pipeline(ins.indices is not None),
        )  # fmt: skip

    with torch.cuda.device_of(x):
        chosen = configuration
        if chosen is None:
            # Where something is to be completed anyway, that lists the tiles in passing.
            chosen = choose(shape, x.device, complete is not None) if _chooser is None else _chooser(shape, run)
        run(chosen)
    return y


# Who chooses instead of the table, while it measures: from a shape and the launch in question.
Chooser = Callable[[Shape, Callable[[Configuration], None]], Configuration]
_chooser: Chooser | None = None
_LISTED = {(False, False): "none", (False, True): "out", (True, False): "in", (True, True): "both"}


def set_chooser(chooser: Chooser | None) -> None:
    """Let somebody else choose configurations, who may launch with any of them; None: the table again."""
    global _chooser
    _chooser = chooser


@lru_cache(maxsize=4096)
def choose(shape: Shape, device: torch.device, tiles_free: bool = False) -> Configuration:
    """The configuration of a shape on a device: measured, else shipped; see ``configurations.configure``."""
    return measured.find(shape, device, tiles_free)


def forget() -> None:
    """Read measured configurations again."""
    measured.measured.cache_clear()
    choose.cache_clear()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; the interpreter counts as one of two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def tile_numbers(shape: Shape, tile: Tile, device: torch.device) -> Tensor:
    """Memory for a list of tiles: how many there are, and as many numbers as there can be tiles."""
    return torch.empty(1 + shape.tiles(tile), dtype=torch.int32, device=device)


def chunk_of(groups: int) -> int:
    """How many groups one step of a kernel looks at."""
    return min(1024, max(16, triton.next_power_of_2(groups)))


def schedule(
    shape: Shape,
    chosen: Configuration,
    samples: int,
    shared: int,
    ins: List,
    outs: List,
    groups: Groups,
    device: torch.device,
) -> Tensor:
    """The list of tiles that there are, longest reductions first: int32, how many, and then their numbers.

    Args:
        shape: Of the convolution.
        chosen: Its configuration.
        samples: Of the batch.
        shared: Samples of a group.
        ins: Listed inputs: they say how long reductions are.
        outs: Listed outputs, where others are not written.
        groups: Which samples share a list.
        device: Where they are.
    """
    tile = chosen.tile
    pixels = shape.pixels // shared
    row_tiles, channel_tiles = triton.cdiv(shape.pixels, tile.rows), triton.cdiv(shape.out_channels, tile.channels)
    tiles = tile_numbers(shape, tile, device)
    schedule_kernels.schedule_kernel[(shape.groups,)](
        ins.counts, outs.counts, *groups, tiles, shape.groups, samples, shared, pixels, row_tiles, channel_tiles,
        ROWS=tile.rows, CHANNELS=tile.channels, CHUNK=chunk_of(shape.groups), num_warps=4,
    )  # fmt: skip
    return tiles


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
