"""The operators behind `optimize`: weights in the kernels' own layouts, as ordinary tensors.

Layouts of filters (K, C, S, S): rows, (K, S, S, C), which is the channels-last layout of the same filters; blocks,
(ceil(K / 32), C, S, S, 32), zeros where K ends; and for a network's first layer (ceil(K / 32), S, S * C, 32). The CPU
library computes gates, blocks and single convolutions from them in float32 and bfloat16. On CUDA devices
gates and basic blocks run on the Triton kernels (not yet measured on hardware), everything else on the definitions
below, from the same tensors; where there is no Triton, and without the CPU library, the definitions serve it all.

3 x 3 filters may come a second time, transformed for Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray,
2016, section 4.1), as rows (K, 16 C + 16) and as blocks (ceil(K / 32), 4, C, 4 * 32): the library then computes from
these wherever it is faster, in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

from gatedkernels import _extension, policy
from gatedkernels.ops.channel_gate.reference import channel_gate_reference
from gatedkernels.ops.gated_block.reference import gated_block_reference
from gatedkernels.ops.gated_conv2d.reference import masked

BLOCK = 32


def pack_rows(weight: Tensor) -> Tensor:
    """Filters (K, C, S, S) as rows."""
    return weight.permute(0, 2, 3, 1).contiguous()


def unpack_rows(rows: Tensor) -> Tensor:
    """The inverse of ``pack_rows``, a view."""
    return rows.permute(0, 3, 1, 2)


def pack_blocks(weight: Tensor) -> Tensor:
    """Filters (K, C, S, S) as blocks."""
    padded = pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % BLOCK))
    return padded.unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 4, 1).contiguous()


def unpack_blocks(blocks: Tensor, out_channels: int) -> Tensor:
    """The inverse of ``pack_blocks``."""
    return blocks.permute(0, 4, 1, 2, 3).flatten(0, 1)[:out_channels]


# Filters to components; pixels to components and components to pixels are in csrc/include/cpu/tiles.h.
_TO_TILES = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_TO_STEM_TILES = (  # those of csrc/include/cpu/stem_tiles.h
    (1, 0, 0, 0),
    (-1 / 3, -1 / 3, -1 / 3, -1 / 3),
    (1 / 3, -1 / 3, 1 / 3, -1 / 3),
    (1 / 15, 2 / 15, 4 / 15, 8 / 15),
    (-16 / 15, 8 / 15, -4 / 15, 2 / 15),
    (0, 0, 0, 1),
)
_LEAST_TILES = 9  # as in csrc/cpu/strips.h
_ROW_PADDING = 16  # numbers at the end of each row, which keep rows out of each other's cache sets


def pack_stem(weight: Tensor) -> Tensor:
    """Filters (K, C, S, S) of few channels as (ceil(K / 32), S, S * C, 32): a window's row is one run of floats."""
    return pack_blocks(weight).permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()


def unpack_stem(packed: Tensor, out_channels: int) -> Tensor:
    """The inverse of ``pack_stem``."""
    side = packed.shape[1]
    return unpack_blocks(packed.unflatten(2, (side, -1)).permute(0, 3, 1, 2, 4), out_channels)


def pack_stem_tiles(weight: Tensor) -> Tensor:
    """Filters (K, C, 7, 7) of stride 2 as (ceil(K / 32), 6, 7, 2 C, 32): six components of each of a window's rows."""
    columns = pad(weight.double(), (0, 1)).unflatten(3, (4, 2))  # even taps, and odd ones
    to_tiles = torch.tensor(_TO_STEM_TILES, dtype=torch.float64, device=weight.device)
    tiles = torch.einsum("nt,kcrtp->nrpck", to_tiles, columns).flatten(2, 3).to(weight.dtype)
    return pad(tiles, (0, -len(weight) % BLOCK)).unflatten(3, (-1, BLOCK)).permute(3, 0, 1, 2, 4).contiguous()


def worth_tiles(height: int, width: int) -> bool:
    """Whether results of this size have so many tiles that the library may compute on them."""
    return ((height + 1) // 2) * ((width + 1) // 2) >= _LEAST_TILES


def _tiles(weight: Tensor) -> Tensor:
    """The 16 components of filters (K, C, 3, 3): (K, C, 16), computed in float64."""
    to_tiles = torch.tensor(_TO_TILES, dtype=torch.float64, device=weight.device)
    return (to_tiles @ weight.double() @ to_tiles.T).flatten(2).to(weight.dtype)


def pack_tile_rows(weight: Tensor) -> Tensor:
    """Filters (K, C, 3, 3) as rows of components."""
    return pad(_tiles(weight).transpose(1, 2).flatten(1), (0, _ROW_PADDING))


def pack_tile_blocks(weight: Tensor) -> Tensor:
    """Filters (K, C, 3, 3) as blocks of components."""
    padded = pad(_tiles(weight), (0, 0, 0, 0, 0, -len(weight) % BLOCK))
    return padded.unflatten(0, (-1, BLOCK)).unflatten(3, (4, 4)).permute(0, 3, 2, 4, 1).flatten(3).contiguous()


def _packed_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tiles1: Tensor | None,
    tiles2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: int = 1,
) -> Tensor:
    filters2 = unpack_blocks(weight2, len(bias2))
    y = gated_block_reference(x, unpack_rows(weight1), bias1, filters2, bias2, mask, residual, (stride, stride))
    return y.contiguous(memory_format=torch.channels_last)


def _packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    stride: int,
    relu: bool,
) -> Tensor:
    y = conv2d(masked(x, in_mask), unpack_blocks(weight, out_channels), bias, stride, weight.shape[2] // 2)
    y = y if residual is None else y + residual
    y = masked(y.relu() if relu else y, out_mask)
    return y.contiguous(memory_format=torch.channels_last)


def spread(mask: Tensor, channels: int) -> Tensor:
    """A mask (N, channels / group) for every channel."""
    return mask if mask.shape[1] == channels else mask.repeat_interleave(channels // mask.shape[1], 1)


def _residual(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tiles1: Tensor | None,
    tiles2: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    mask: Tensor,
    stride: int,
) -> Tensor:
    residual = x
    if shortcut_weight is not None and shortcut_bias is not None:
        residual = _packed_conv2d(
            x, shortcut_weight, shortcut_bias, None, None, None, len(shortcut_bias), stride, relu=False
        )
    opened = spread(mask, len(bias1))
    return _packed_block(x, weight1, bias1, weight2, bias2, tiles1, tiles2, opened, residual, stride)


def _packed_residual(
    x: Tensor,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tiles1: Tensor | None = None,
    tiles2: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    decided = channel_gate_reference(x, gate_weight1, gate_bias1, gate_weight2, gate_bias2)
    weights = weight1, bias1, weight2, bias2, tiles1, tiles2, shortcut_weight, shortcut_bias
    return _residual(x, *weights, decided if mask is None else mask, stride)


def _packed_bottleneck(
    x: Tensor, parts: Sequence[Tensor | None], mask1: Tensor | None, mask2: Tensor | None, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    own: list[Any] = list(parts)
    weight1, bias1, weight2, bias2, weight3, bias3 = own[8:14]
    hidden = len(bias1)

    def decide(gate: Sequence[Any], images: Tensor) -> Tensor:
        if gate[0] is None:
            return torch.ones(len(x), hidden, dtype=torch.bool, device=x.device)
        return channel_gate_reference(images, *gate)

    decided1 = decide(own[:4], x)
    open1 = spread(decided1 if mask1 is None else mask1, hidden)
    h = masked(conv2d(x, weight1, bias1).relu(), open1)
    decided2 = decide(own[4:8], h)
    open2 = spread(decided2 if mask2 is None else mask2, hidden)
    h = _packed_conv2d(h, weight2, bias2, open1, open2, None, hidden, stride, relu=True)
    residual = x
    if own[14] is not None:
        residual = _packed_conv2d(x, own[14], own[15], None, None, None, len(bias3), stride, relu=False)
    return _packed_conv2d(h, weight3, bias3, open2, None, residual, len(bias3), 1, relu=True), decided1, decided2


def _packed_bottleneck_(
    x: Tensor, parts: Sequence[Tensor | None], mask1: Tensor | None, mask2: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, *decided = _packed_bottleneck(x, parts, mask1, mask2, 1)
    x.copy_(y)
    return decided[0], decided[1]


def _packed_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _packed_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    relu: bool,
    pool: bool,
    tiles: Tensor | None = None,
) -> Tensor:
    y = conv2d(x, unpack_stem(weight, len(bias)), bias, stride, padding)
    y = y.relu() if relu else y
    return (max_pool2d(y, 3, 2, 1) if pool else y).contiguous(memory_format=torch.channels_last)


def _packed_network(
    images: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor,
    stem_tiles: Tensor | None,
    stem: Sequence[int],
    parts: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    strides: Sequence[int],
) -> Tensor:
    stem_stride, padding, relu, pool = stem
    x = _packed_stem(
        images.to(stem_weight.dtype), stem_weight, stem_bias, stem_stride, padding, bool(relu), bool(pool)
    ).to(images.dtype)
    for i, (mask, stride) in enumerate(zip(masks, strides, strict=True)):
        own = cast(list[Any], parts[12 * i : 12 * (i + 1)])
        gate, weights = own[:4], own[4:]
        if mask is None and gate[0] is None:
            mask = torch.ones(len(x), len(weights[0]), dtype=torch.bool, device=x.device)
        opened = channel_gate_reference(x, *gate) if mask is None else mask
        x = _residual(*[x, *weights, opened, stride])
    return _packed_pool(x)


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "channel_gate": channel_gate_reference,
    "packed_block": _packed_block,
    "packed_bottleneck": _packed_bottleneck,
    "packed_bottleneck_": _packed_bottleneck_,
    "packed_conv2d": _packed_conv2d,
    "packed_network": _packed_network,
    "packed_pool": _packed_pool,
    "packed_residual": _packed_residual,
    "packed_stem": _packed_stem,
}


def block_on_gpu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tiles1: Tensor | None,
    tiles2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: int = 1,
) -> Tensor:
    """``packed_block`` as CUDA devices serve it: by the Triton kernels where they can, else by its definition.

    The kernels read rows and blocks as they lie; tiles stay unused.
    """
    if policy.triton_problem(x) is not None:
        return _packed_block(x, weight1, bias1, weight2, bias2, tiles1, tiles2, mask, residual, stride)
    from gatedkernels.ops.ragged import optimized  # importing the package imports no Triton

    return optimized.packed_block(x, weight1, bias1, weight2, bias2, mask, residual, (stride, stride))


def gate_on_gpu(x: Tensor, *layers: Tensor) -> Tensor:
    """``channel_gate`` likewise, in one launch."""
    if not holds_gate(x, layers):
        return channel_gate_reference(x, *layers)
    from gatedkernels.ops.channel_gate import launch

    return launch.channel_gate(x, layers, listed=False)[0]


def residual_on_gpu(
    x: Tensor,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tiles1: Tensor | None = None,
    tiles2: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """``packed_residual`` likewise: three launches, and one for a shortcut that convolves."""
    layers = gate_weight1, gate_bias1, gate_weight2, gate_bias2
    weights, shortcut = (weight1, bias1, weight2, bias2), (shortcut_weight, shortcut_bias)
    if not holds_gate(x, layers):
        return _packed_residual(x, *layers, *weights, tiles1, tiles2, *shortcut, mask, stride)
    from gatedkernels.ops.ragged import optimized

    given = None if mask is None else spread(mask, len(bias1))
    return optimized.packed_residual(x, layers, *weights, given, *shortcut, stride)[0]


def holds_gate(x: Tensor, layers: Sequence[Tensor]) -> bool:
    """Whether the Triton kernel serves a gate with these weights and biases, on images like these."""
    if policy.triton_problem(x) is not None:
        return False
    from gatedkernels.ops.channel_gate import configurations

    return max(layers[0].shape[1], len(layers[3])) <= configurations.MOST


_ON_GPU: dict[str, Callable[..., Any]] = {
    **DEFINITIONS,
    "channel_gate": gate_on_gpu,
    "packed_block": block_on_gpu,
    "packed_residual": residual_on_gpu,
}
for _name, _definition in DEFINITIONS.items():
    torch.library.impl(f"gatedkernels::{_name}", "CUDA", _ON_GPU[_name])
    if _extension.CPU_ERROR is not None:
        torch.library.impl(f"gatedkernels::{_name}", "CPU", _definition)


def refuse_gradients(ctx, *gradients):  # type: ignore[no-untyped-def]
    """The backward of an operator that has none."""
    raise RuntimeError("an optimised module has no gradients; differentiate the original")


def images_like(x: Tensor, channels: int, stride: int) -> Tensor:
    """What blocks return, without values."""
    size = ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return x.new_empty((x.shape[0], channels, *size)).to(memory_format=torch.channels_last)


@torch.library.register_fake("gatedkernels::channel_gate")
def _(x, weight1, bias1, weight2, bias2):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight2.shape[0]), dtype=torch.bool)


@torch.library.register_fake("gatedkernels::packed_block")
def _(x, weight1, bias1, weight2, bias2, tiles1, tiles2, mask, residual, stride=1):  # type: ignore[no-untyped-def]
    return images_like(x, bias2.shape[0], stride)


@torch.library.register_fake("gatedkernels::packed_residual")
def _(x, *arguments):  # type: ignore[no-untyped-def]
    return images_like(x, arguments[7].shape[0], arguments[13] if len(arguments) > 13 else 1)


@torch.library.register_fake("gatedkernels::packed_bottleneck")
def _(x, parts, mask1, mask2, stride):  # type: ignore[no-untyped-def]
    return images_like(x, parts[13].shape[0], stride), *_decided_like(x, parts)


@torch.library.register_fake("gatedkernels::packed_bottleneck_")
def _(x, parts, mask1, mask2):  # type: ignore[no-untyped-def]
    return _decided_like(x, parts)


def _decided_like(x, parts):  # type: ignore[no-untyped-def]
    decisions = (parts[9 if parts[i] is None else i].shape[0] for i in (3, 7))
    return tuple(x.new_empty((x.shape[0], many), dtype=torch.bool) for many in decisions)


@torch.library.register_fake("gatedkernels::packed_pool")
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[:2])


@torch.library.register_fake("gatedkernels::packed_network")
def _(images, stem_weight, stem_bias, stem_tiles, stem, parts, masks, strides):  # type: ignore[no-untyped-def]
    return images.new_empty((images.shape[0], parts[-5].shape[0] if parts else stem_bias.shape[0]))


@torch.library.register_fake("gatedkernels::packed_conv2d")
def _(x, weight, bias, in_mask, out_mask, residual, out_channels, stride, relu):  # type: ignore[no-untyped-def]
    return images_like(x, out_channels, stride)


@torch.library.register_fake("gatedkernels::packed_stem")
def _(x, weight, bias, stride, padding, relu, pool, tiles=None):  # type: ignore[no-untyped-def]
    size = [(length + 2 * padding - weight.shape[1]) // stride + 1 for length in x.shape[2:]]
    size = [(length - 1) // 2 + 1 for length in size] if pool else size
    return x.new_empty((x.shape[0], bias.shape[0], *size)).to(memory_format=torch.channels_last)
