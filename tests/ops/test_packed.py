"""The operators of packed weights against plain PyTorch: what ``optimize`` runs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, max_pool2d

from gatedkernels import _extension
from gatedkernels.ops.packed import (
    DEFINITIONS,
    pack_blocks,
    pack_rows,
    pack_stem,
    pack_stem_tiles,
    pack_tile_blocks,
    pack_tile_rows,
    unpack_blocks,
    unpack_rows,
    unpack_stem,
)

ops = torch.ops.gatedkernels
DENSITIES = [None, 0.0, 0.4, 1.0]
DTYPES = [torch.float32, torch.bfloat16]

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def make_mask(n: int, channels: int, density: float | None) -> Tensor | None:
    return None if density is None else torch.rand(n, channels) < density


def where(mask: Tensor | None, x: Tensor) -> Tensor:
    return x if mask is None else torch.where(mask[:, :, None, None], x, 0)


def assert_agrees(
    operator: Callable[..., Tensor], definition: Callable[..., Tensor], tensors: list[Any], check: Callable[..., None]
) -> None:
    """``definition`` in the dtype of the tensors, of both layouts, sets the budget against float64."""
    exact = definition(*(t if t is None or t.dtype == torch.bool else t.double() for t in tensors))
    own = [definition(tensors[0].contiguous(memory_format=form), *tensors[1:])
           for form in (torch.contiguous_format, torch.channels_last)]  # fmt: skip
    y = operator(*tensors)
    check(y, exact, *own)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (32, 5, 3, 3), (33, 4, 1, 1), (64, 2, 3, 3)], ids=str)
def test_layouts_of_packed_weights(shape: tuple[int, ...]):
    weight = torch.randn(shape)
    k, c, s, _ = shape
    rows, blocks = pack_rows(weight), pack_blocks(weight)
    assert rows.shape == (k, s, s, c)
    assert blocks.shape == (-(-k // 32), c, s, s, 32)
    assert rows.is_contiguous()
    assert blocks.is_contiguous()
    assert torch.equal(unpack_rows(rows), weight)
    assert torch.equal(unpack_blocks(blocks, k), weight)
    assert not unpack_blocks(blocks, blocks.shape[0] * 32)[k:].any()


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (5, 1, 3, 3), (33, 4, 1, 1)], ids=str)
def test_layout_of_stem_weights(shape: tuple[int, ...]):
    weight = torch.randn(shape)
    k, c, s, _ = shape
    packed = pack_stem(weight)
    assert packed.shape == (-(-k // 32), s, s * c, 32)
    assert torch.equal(packed[0, 0, :c, 0], weight[0, :, 0, 0])
    assert torch.equal(unpack_stem(packed, k), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_transformed_weights(dtype: torch.dtype):
    weight = torch.randn(33, 5, 3, 3).to(dtype)
    rows, blocks = pack_tile_rows(weight), pack_tile_blocks(weight)
    assert rows.shape == (33, 16 * 5 + 16)
    assert blocks.shape == (2, 4, 5, 4 * 32)
    components = rows[:, :-16].unflatten(1, (16, 5))
    pieces = blocks.unflatten(3, (4, 32)).transpose(2, 3).flatten(1, 2)
    assert torch.equal(pieces.permute(0, 3, 1, 2).flatten(0, 1)[:33], components)
    assert not rows[:, -16:].any()
    corners = torch.stack([weight[..., i, j] for i in (0, 2) for j in (0, 2)], 1)
    assert torch.equal(components[:, [0, 3, 12, 15]], corners)  # they go into their components alone


def test_components_convolve():
    """The transformed filters are those of the minimal filtering algorithm, whose other transforms are written here."""
    pixels = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
    results = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)
    patch, weight = torch.randn(5, 4, 4, dtype=torch.float64), torch.randn(3, 5, 3, 3, dtype=torch.float64)
    filters = pack_tile_rows(weight)[:, : 16 * 5].unflatten(1, (4, 4, 5)).permute(0, 3, 1, 2)
    products = (filters * (pixels @ patch @ pixels.T)).sum(1)
    torch.testing.assert_close(results @ products @ results.T, conv2d(patch[None], weight)[0])


# N, C, M (hidden), K, H, W
GATES = [
    (2, 64, 16, 64, 8, 8), (1, 7, 5, 3, 1, 1), (3, 130, 33, 70, 5, 4), (0, 8, 4, 8, 2, 2), (19, 20, 6, 21, 3, 2),
    (1, 330, 121, 334, 3, 3),
]  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GATES, ids=str)
def test_channel_gate(size: tuple[int, ...], dtype: torch.dtype, layout: str, images):
    n, c, m, k, h, w = size
    x = images((n, c, h, w), layout, dtype)
    weight1, bias1, weight2, bias2 = (torch.randn(shape).to(dtype) for shape in ((m, c), (m,), (k, m), (k,)))
    mask = ops.channel_gate(x, weight1, bias1, weight2, bias2)
    hidden = linear(x.double().mean((2, 3)), weight1.double(), bias1.double()).relu()
    logits = linear(hidden, weight2.double(), bias2.double())
    assert mask.dtype == torch.bool
    assert mask.shape == (n, k)
    clear = logits.abs() > 1e-5 * logits.abs().amax() if n else torch.ones(n, k, dtype=torch.bool)
    assert torch.equal(mask[clear], (logits >= 0)[clear])
    assert clear.all()  # for these seeds no logit is so near the threshold that rounding decides


@needs_cpu
def test_channel_gate_opens_at_zero():
    zeros = torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), torch.zeros(2), torch.zeros(5, 2)
    assert ops.channel_gate(*zeros, torch.zeros(5)).all()
    assert not ops.channel_gate(*zeros, torch.full((5,), -1e-6)).any()


# N, C, M (hidden), K, H, W, stride
BLOCKS = [
    (2, 64, 64, 64, 8, 8, 1),
    (2, 32, 64, 70, 9, 7, 2),
    (5, 70, 35, 70, 4, 4, 1),
    (1, 3, 40, 33, 17, 15, 1),
    (20, 300, 70, 40, 3, 3, 1),
    (3, 5, 3, 2, 1, 2, 2),
    (0, 8, 8, 8, 4, 4, 1),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 33, 600, 97, 2, 13, 1),
]

# Such that computing on tiles pays at densities of 0.4 and more, or 1 in bfloat16.
TILED_BLOCKS = [
    (2, 64, 96, 64, 8, 8, 1),
    (1, 35, 70, 47, 17, 15, 1),
    (9, 16, 60, 33, 14, 14, 1),
    (1, 20, 80, 40, 33, 41, 1),
    (3, 48, 50, 70, 12, 7, 1),
    (2, 20, 60, 36, 18, 22, 2),
    (1, 256, 100, 64, 9, 6, 1),
    (2, 24, 70, 40, 12, 13, 1),
    (2, 64, 97, 64, 10, 12, 1),
]


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("density", DENSITIES[1:])
@pytest.mark.parametrize(
    ("shape", "tiled"), [*((s, False) for s in BLOCKS), *((s, True) for s in TILED_BLOCKS)], ids=str
)
def test_packed_block(
    shape: tuple[int, ...], tiled: bool, density: float, with_residual: bool, dtype: torch.dtype, layout: str, images,
    assert_within_budget,
):  # fmt: skip
    n, c, m, k, h, w, stride = shape
    weight1, weight2 = torch.randn(m, c, 3, 3) / (3 * c**0.5), torch.randn(k, m, 3, 3) / (3 * m**0.5)
    out = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    residual = images(out, layout, dtype) if with_residual else None
    mask = make_mask(n, m, density)

    def operator(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, skip: Tensor | None) -> Tensor:
        tiles = (pack_tile_rows(w1) if stride == 1 else None, pack_tile_blocks(w2)) if tiled else (None, None)
        return ops.packed_block(x, pack_rows(w1), b1, pack_blocks(w2), b2, *tiles, mask, skip, stride)

    def definition(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, skip: Tensor | None) -> Tensor:
        y = conv2d(where(mask, conv2d(x, w1, b1, stride, 1).relu()), w2, b2, 1, 1)
        return (y if skip is None else y + skip).relu()

    weights = (t.to(dtype) for t in (weight1, torch.randn(m), weight2, torch.randn(k)))
    assert_agrees(operator, definition, [images((n, c, h, w), layout, dtype), *weights, residual], assert_within_budget)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", [0, 1, 7, 20])
def test_packed_block_never_reads_closed_channels(active: int, dtype: torch.dtype, images):
    x, bias2 = images((1, 17, 6, 5), "channels_last", dtype), torch.randn(40).to(dtype)
    mask = (torch.randperm(20) < active)[None]
    clean = [t.to(dtype) for t in (torch.randn(20, 17, 3, 3) / 9, torch.randn(20), torch.randn(40, 20, 3, 3) / 9)]
    poisoned = [t.clone() for t in clean]
    poisoned[0][~mask[0]] = poisoned[1][~mask[0]] = torch.nan
    poisoned[2][:, ~mask[0]] = torch.nan
    expected, y = (
        ops.packed_block(x, pack_rows(w1), b1, pack_blocks(w2), bias2, None, None, mask, None, 1)
        for w1, b1, w2 in (clean, poisoned)
    )
    assert torch.equal(y, expected)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_block_leaves_nothing_behind(dtype: torch.dtype):
    """What a call leaves in the threads' scratch memory, NaN here, does not reach the next one."""
    weight1, weight2, bias = (
        t.to(dtype) for t in (torch.randn(96, 32, 3, 3), torch.randn(32, 96, 3, 3), torch.zeros(96))
    )
    packed = pack_rows(weight1), bias, pack_blocks(weight2), bias[:32], pack_tile_rows(weight1)
    tiles2, mask = pack_tile_blocks(weight2), torch.ones(2, 96, dtype=torch.bool)
    x = torch.randn(2, 32, 11, 9).to(dtype)
    clean = ops.packed_block(x, *packed, tiles2, mask, None, 1)
    for poison in (torch.full((2, 32, 24, 24), torch.nan, dtype=dtype), torch.full_like(x, torch.inf)):
        assert not ops.packed_block(poison, *packed, tiles2, mask, None, 1).isfinite().all()
        assert torch.equal(ops.packed_block(x, *packed, tiles2, mask, None, 1), clean)


# N, C, K, H, W, side of the window, stride, padding
STEMS = [
    (2, 3, 64, 32, 32, 3, 1, 1),
    (1, 3, 70, 37, 30, 7, 2, 3),
    (2, 1, 64, 80, 83, 7, 2, 3),
    (1, 5, 9, 7, 7, 7, 2, 0),
    (2, 3, 40, 7, 17, 7, 2, 3),
    (2, 3, 40, 12, 1, 7, 2, 3),
    (3, 1, 5, 9, 7, 3, 1, 2),
    (2, 4, 33, 11, 13, 5, 3, 0),
    (1, 8, 16, 5, 1, 1, 1, 0),
    (0, 3, 8, 8, 8, 3, 1, 1),
]


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", STEMS, ids=str)
def test_packed_stem(shape: tuple[int, ...], pool: bool, dtype: torch.dtype, layout: str, images, assert_within_budget):
    n, c, k, h, w, side, stride, padding = shape

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tiles = pack_stem_tiles(weight) if (side, stride) == (7, 2) else None
        return ops.packed_stem(x, pack_stem(weight), bias, stride, padding, pool, pool, tiles)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = conv2d(x, weight, bias, stride, padding)
        return max_pool2d(y.relu(), 3, 2, 1) if pool else y

    tensors = [images((n, c, h, w), layout, dtype), torch.randn(k, c, side, side).to(dtype), torch.randn(k).to(dtype)]
    assert_agrees(operator, definition, tensors, assert_within_budget)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_stem_pools_nan(dtype: torch.dtype):
    x = torch.randn(1, 3, 12, 12).to(dtype)
    x[0, 1, 5, 5] = torch.nan
    weight, bias = torch.randn(20, 3, 3, 3).to(dtype), torch.randn(20).to(dtype)
    y = ops.packed_stem(x, pack_stem(weight), bias, 1, 1, False, True)
    assert torch.equal(y.isnan(), max_pool2d(conv2d(x, weight, bias, 1, 1), 3, 2, 1).isnan())


# N, C, K, H, W, side of the window, stride
CONVS = [
    (2, 64, 64, 8, 8, 3, 1),
    (1, 3, 40, 17, 15, 3, 2),
    (3, 70, 130, 5, 6, 1, 1),
    (2, 17, 31, 6, 7, 1, 2),
    (1, 1, 1, 1, 1, 3, 1),
    (0, 8, 8, 4, 4, 3, 1),
]


@needs_cpu
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("densities", [(None, None), (0.4, None), (None, 0.4), (0.4, 0.4), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_packed_conv2d(
    shape: tuple[int, ...], densities: tuple[float | None, ...], with_residual: bool, layout: str, images,
    assert_within_budget,
):  # fmt: skip
    n, c, k, h, w, side, stride = shape
    in_mask, out_mask = make_mask(n, c, densities[0]), make_mask(n, k, densities[1])
    residual = images((n, k, (h - 1) // stride + 1, (w - 1) // stride + 1), layout) if with_residual else None

    def operator(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None) -> Tensor:
        return ops.packed_conv2d(x, pack_blocks(weight), bias, in_mask, out_mask, skip, k, stride, with_residual)

    def definition(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None) -> Tensor:
        y = conv2d(where(in_mask, x), weight, bias, stride, side // 2)
        y = y if skip is None else (y + skip).relu()
        return where(out_mask, y)

    tensors = [images((n, c, h, w), layout), torch.randn(k, c, side, side), torch.randn(k), residual]
    assert_agrees(operator, definition, tensors, assert_within_budget)


@needs_cpu
def test_packed_conv2d_never_reads_closed_channels(layout: str, images):
    in_mask, out_mask = make_mask(3, 20, 0.5), make_mask(3, 40, 0.5)
    clean, weight, bias = images((3, 20, 5, 6), layout), pack_blocks(torch.randn(40, 20, 3, 3)), torch.randn(40)
    poisoned = torch.where(in_mask[..., None, None], clean, torch.nan)
    expected, y = (ops.packed_conv2d(x, weight, bias, in_mask, out_mask, None, 40, 1, False) for x in (clean, poisoned))
    torch.testing.assert_close(y, expected)
    assert not y[~out_mask].any()


@needs_cpu
@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_serve_where_the_library_does_not(name: str, images):
    """The Python definitions, that CUDA and builds without a compiler use, compute what the library does."""
    x, mask = images((2, 8, 5, 5)), torch.rand(2, 8) < 0.5
    weight, bias = torch.randn(8, 8, 3, 3) / 9, torch.randn(8)
    block, shortcut = (
        (pack_rows(weight), bias, pack_blocks(weight), bias, None, None),
        (pack_blocks(weight[:, :, :1, :1]), bias),
    )
    bottleneck = [
        *(torch.randn(shape) for inputs in (8, 2) for shape in ((6, inputs), (6,), (2, 6), (2,))),
        torch.randn(2, 8, 1, 1), bias[:2], pack_blocks(weight[:2, :2]), bias[:2],
        pack_blocks(weight[:, :2, :1, :1]), bias, None, None,
    ]  # fmt: skip
    arguments = {
        "channel_gate": (x, torch.randn(6, 8), torch.randn(6), torch.randn(9, 6), torch.randn(9)),
        "packed_block": (x, pack_rows(weight), bias, pack_blocks(weight), bias, None, None, mask, x, 1),
        "packed_bottleneck": (x, bottleneck, None, mask[:, :2], 1),
        "packed_bottleneck_": (x.contiguous(memory_format=torch.channels_last), bottleneck, None, None),
        "packed_conv2d": (x, pack_blocks(weight), bias, mask, ~mask, x, 8, 1, True),
        "packed_network": (
            x, pack_stem(weight), bias, None, [1, 1, 1, 0],
            [torch.randn(6, 8), torch.randn(6), torch.randn(8, 6), torch.randn(8), *block, *shortcut,
             *[None] * 4, *block, None, None],
            [None, mask], [2, 1],
        ),
        "packed_pool": (x,),
        "packed_residual": (
            x, torch.randn(6, 8), torch.randn(6), torch.randn(8, 6), torch.randn(8), *block, *shortcut,
            None, 1,
        ),
        "packed_stem": (x, pack_stem(weight), bias, 1, 1, True, True),
    }[name]  # fmt: skip
    first, second = (copy.deepcopy(arguments) for _ in range(2))  # one of them writes into its images
    actual, expected = getattr(ops, name)(*first), DEFINITIONS[name](*second)
    torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (actual, expected)), strict=True):
        assert one.stride() == other.stride()


@needs_cpu
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_residual_is_its_parts(dtype: torch.dtype, given: bool, with_shortcut: bool, layout: str, images):
    n, c, m, k = 3, 24, 24, (40 if with_shortcut else 24)
    stride = 2 if with_shortcut else 1
    x = images((n, c, 9, 7), layout, dtype)
    gate = [torch.randn(shape) for shape in ((5, c), (5,), (m, 5), (m,))]
    weight1, weight2 = (torch.randn(shape).to(dtype) / 15 for shape in ((m, c, 3, 3), (k, m, 3, 3)))
    block = pack_rows(weight1), torch.randn(m).to(dtype), pack_blocks(weight2), torch.randn(k).to(dtype), None, None
    shortcut = pack_blocks(torch.randn(k, c, 1, 1).to(dtype)), torch.randn(k).to(dtype)
    mask = torch.rand(n, m) < 0.5 if given else None
    rest = (*shortcut, mask, stride) if with_shortcut else () if mask is None else (None, None, mask)
    y = ops.packed_residual(x, *gate, *block, *rest)
    decided = ops.channel_gate(x, *gate)
    residual = ops.packed_conv2d(x, *shortcut, None, None, None, k, stride, False) if with_shortcut else x
    expected = ops.packed_block(x, *block, decided if mask is None else mask, residual, stride)
    assert torch.equal(y, expected)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 3), (0, 4, 2, 2), (1, 1, 1, 1), (9, 32, 8, 8)], ids=str)
def test_packed_pool(shape: tuple[int, ...], dtype: torch.dtype, layout: str, images):
    x = images(shape, layout, dtype)
    y = ops.packed_pool(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x.double().mean((2, 3)).to(dtype))


@needs_cpu
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_packed_conv2d_in_bfloat16(
    shape: tuple[int, ...], with_residual: bool, layout: str, images, assert_within_budget
):
    n, c, k, h, w, side, stride = shape
    size = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    residual = images(size, layout, torch.bfloat16) if with_residual else None

    def operator(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None) -> Tensor:
        return ops.packed_conv2d(x, pack_blocks(weight), bias, None, None, skip, k, stride, with_residual)

    def definition(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None) -> Tensor:
        y = conv2d(x, weight, bias, stride, side // 2)
        return y if skip is None else (y + skip).relu()

    weight, bias = torch.randn(k, c, side, side).bfloat16(), torch.randn(k).bfloat16()
    tensors = [images((n, c, h, w), layout, torch.bfloat16), weight, bias, residual]
    assert_agrees(operator, definition, tensors, assert_within_budget)


@needs_cpu
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_registration(n: int, stride: int, images):
    x, mask = images((n, 8, 5, 4), "channels_last"), torch.rand(n, 8) < 0.5
    weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
    for operator, arguments in (
        (ops.channel_gate, (x, torch.randn(6, 8), torch.randn(6), torch.randn(9, 6), torch.randn(9))),
        (ops.packed_block, (x, pack_rows(weight), bias, pack_blocks(weight), bias, None, None, mask, None, stride)),
        (ops.packed_conv2d, (x, pack_blocks(weight), bias, mask, ~mask, None, 8, stride, True)),
        (
            ops.packed_network,
            (
                x,
                pack_stem(weight),
                bias,
                None,
                [stride, 1, 1, 0],
                [None] * 4 + [pack_rows(weight), bias, pack_blocks(weight), bias] + [None] * 4,
                [mask],
                [1],
            ),
        ),
        (ops.packed_pool, (x,)),
        (
            ops.packed_residual,
            (
                x,
                torch.randn(6, 8),
                torch.randn(6),
                torch.randn(8, 6),
                torch.randn(8),
                pack_rows(weight),
                bias,
                pack_blocks(weight),
                bias,
                None,
                None,
                pack_blocks(weight[:, :, :1, :1]),
                bias,
                mask,
                stride,
            ),
        ),
    ):
        torch.library.opcheck(operator.default, arguments)
