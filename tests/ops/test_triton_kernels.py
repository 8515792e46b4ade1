"""The Triton kernels against the reference: on a GPU, or interpreted on the CPU (test_triton.py starts that)."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels.ops import packed
from gatedkernels.ops.plan.reference import active, pack, plan_reference, unpack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("exact_float32"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# N, C, K, H, W, R, S, stride, padding, dilation
GEOMETRIES = [
    (3, 20, 37, 5, 6, 3, 3, 1, 1, 1),
    (2, 17, 19, 7, 6, 3, 3, 2, 1, 1),
    (3, 40, 70, 3, 3, 1, 1, 1, 0, 1),
    (1, 1, 1, 4, 3, 3, 3, 1, 1, 1),
    (2, 33, 5, 5, 8, 1, 1, 2, 0, 1),
    (2, 6, 9, 7, 8, 2, 3, (2, 3), (2, 0), (1, 2)),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw(samples: int, channels: int, density: float) -> Tensor:
    return torch.rand(samples, channels, device=DEVICE) < density


def poisoned(x: Tensor, mask: Tensor | None) -> Tensor:
    """NaN in the channels that are closed."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, torch.nan)


def check_conv(
    compare: Callable[..., None], case: Sequence, ins: float | None, outs: float | None, dtype: torch.dtype
) -> None:
    n, c, k, h, w, r, s, stride, padding, dilation = case
    in_mask = None if ins is None else draw(n, c, ins)
    out_mask = None if outs is None else draw(n, k, outs)
    options = {"stride": stride, "padding": padding, "dilation": dilation}

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda x, *rest: gk.gated_conv2d(x, *rest, in_mask, out_mask, **options, backend=backend)

    x = poisoned(randn(n, c, h, w, dtype=dtype), in_mask)
    compare(run("triton"), run("reference"), [x, randn(k, c, r, s, dtype=dtype), randn(k, dtype=dtype)], rounding=2)


@pytest.mark.parametrize(("ins", "outs"), [(0.5, None), (None, 0.5), (0.5, 0.5), (None, None)])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_convolutions_of_any_geometry(compare, case: tuple, ins: float | None, outs: float | None):
    check_conv(compare, case, ins, outs, torch.float32)


@pytest.mark.parametrize(("ins", "outs"), [(0.0, None), (None, 0.0), (1.0, None), (None, 1.0), (1.0, 0.0)])
def test_all_open_and_all_closed(compare, ins: float | None, outs: float | None):
    check_conv(compare, GEOMETRIES[0], ins, outs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("ins", "outs"), [(0.5, None), (None, 0.5)])
def test_other_dtypes(compare, ins: float | None, outs: float | None, dtype: torch.dtype):
    check_conv(compare, GEOMETRIES[1], ins, outs, dtype)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded"])
def test_layouts(images, layout: str):
    x = images((2, 10, 4, 5), layout, device=DEVICE)
    weight, mask = randn(20, 10, 3, 3), draw(2, 20, 0.5)
    for masks in ((None, mask), (draw(2, 10, 0.5), None)):
        y, exact = (gk.gated_conv2d(x, weight, None, *masks, padding=1, backend=b) for b in ("triton", "reference"))
        assert y.stride() == exact.stride()
        torch.testing.assert_close(y, exact)


@pytest.mark.parametrize(("ins", "outs"), [(0.4, None), (0.4, 0.5)])
def test_dense_input_gradients(gradients, ins: float, outs: float | None):
    in_mask, out_mask = draw(3, 20, ins), None if outs is None else draw(3, 37, outs)
    tensors = [randn(3, 20, 5, 4), randn(37, 20, 3, 3), randn(37)]

    def run(backend: str) -> list[Tensor | None]:
        options = {"padding": 1, "dense_input_grad": True, "backend": backend}
        return gradients(lambda x, *rest: gk.gated_conv2d(x, *rest, in_mask, out_mask, **options), tensors)

    for own, exact in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    x, mask = randn(0, 8, 4, 4).requires_grad_(), draw(0, 6, 0.5)
    weight = randn(6, 8, 3, 3).requires_grad_()
    y = gk.gated_conv2d(x, weight, None, None, mask, padding=1, backend="triton")
    assert y.shape == (0, 6, 4, 4)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("channels", [1, 37, 1025])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_plan_lists_the_union(channels: int, shared: int):
    from gatedkernels.ops.ragged import launch

    for density in (0.0, 0.3, 1.0):
        mask = draw(channels, 5, density).T
        union = torch.stack([rows.any(0) for rows in mask.split(shared)])
        found = launch.plan(mask, shared)[:2]
        for own, exact in zip(found, plan_reference(union), strict=True):
            assert torch.equal(own, exact)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_blocks(compare, stride: int, density: float):
    n, c, m, k, h, w = 2, 12, 37, 18, 5, 4
    mask, size = draw(n, m, density), ((h - 1) // stride + 1, (w - 1) // stride + 1)

    def run(backend: str) -> Callable[..., Tensor]:
        return lambda *t: gk.gated_block(*t[:5], mask, residual=t[5], stride=stride, backend=backend)

    tensors = [randn(n, c, h, w), randn(m, c, 3, 3), randn(m), randn(k, m, 3, 3), randn(k), randn(n, k, *size)]
    compare(run("triton"), run("reference"), tensors, rounding=2)
    y = gk.gated_block(tensors[0], tensors[1], None, tensors[3], None, mask, stride=stride, backend="triton")
    exact = gk.gated_block(tensors[0], tensors[1], None, tensors[3], None, mask, stride=stride, backend="reference")
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_stays_where_it_is():
    x = randn(1, 5, 4, 6)
    x[0, 0, 0, 0] = torch.inf
    weights, mask = (randn(20, 5, 3, 3), None, randn(9, 20, 3, 3), None), draw(1, 20, 0.3)
    y = gk.gated_block(x, *weights, mask, backend="triton")
    # On the CPU: what cuDNN transforms, an infinity leaves beyond the window.
    own = [None if each is None else each.cpu() for each in (x, *weights, mask)]
    exact = gk.gated_block(*own, backend="reference").to(y.device)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert y[..., 4:].isfinite().all()


def test_packed_operations(compare):
    mask = draw(3, 37, 0.4)
    index, count = plan_reference(mask)
    x, weight, bias = randn(3, 6, 5, 4), randn(37, 6, 3, 3), randn(37)

    def out(backend: str) -> Callable[..., Tensor]:
        return lambda *t: gk.ops.conv_out(*t, index, count, padding=1, relu=True, backend=backend)

    compare(out("triton"), out("reference"), [x, weight, bias], rounding=2)
    packed = poisoned(pack(randn(3, 37, 5, 4), index, count), active(index, count))

    def into(backend: str) -> Callable[..., Tensor]:
        return lambda *t: gk.ops.conv_in(*t, index, count, padding=1, backend=backend)

    compare(into("triton"), into("reference"), [packed, randn(8, 37, 3, 3), randn(8)], rounding=2)


@pytest.mark.parametrize(("ins", "outs"), [(0.5, None), (None, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize(("samples", "tokens"), [((3,), (5,)), ((3,), ()), ((3, 4), ())], ids=str)
def test_linear_layers(gradients, samples: tuple, tokens: tuple, ins: float | None, outs: float | None):
    """Masks of samples with tokens, of samples without, and of tokens."""
    in_mask = None if ins is None else torch.rand(*samples, 20, device=DEVICE) < ins
    out_mask = None if outs is None else torch.rand(*samples, 37, device=DEVICE) < outs
    tensors = [randn(*samples, *tokens, 20), randn(37, 20), randn(37)]
    own, exact = (
        gradients(lambda *t: gk.gated_linear(*t, in_mask, out_mask, backend=backend), tensors)  # noqa: B023
        for backend in ("triton", "reference")
    )
    for one, other in zip(own, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_neighbouring_samples_share_a_list():
    """What only the neighbour keeps is zero."""
    from gatedkernels.ops.ragged import gated

    for samples, shared in ((5, 2), (3, 4)):
        mask = draw(samples, 37, 0.4)
        tensors = [randn(*s) for s in ((samples, 8, 3, 5), (37, 8, 3, 3), (37,), (9, 37, 3, 3), (9,))]
        residual = randn(samples, 9, 3, 5)
        y = gated.gated_block(*tensors, mask, residual, (1, 1), shared)
        exact = gk.gated_block(*tensors, mask, residual=residual, backend="reference")
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [1, 3])
def test_widths_need_no_list(shared: int):
    """The first channels, as many as each sample has: a slimmable layer, whole batches and sample by sample."""
    from gatedkernels.ops.ragged import launch

    x, weight = randn(3, 20, 4, 5).contiguous(memory_format=torch.channels_last), randn(30, 20, 3, 3)
    lists = -(-3 // shared)
    ins, outs = (torch.randint(1, most, (lists,), dtype=torch.int32, device=DEVICE) for most in (20, 30))
    y = torch.empty(3, 4, 5, 30, device=DEVICE).permute(0, 3, 1, 2)
    launch.convolve(x, weight, None, y, launch.List(None, ins), launch.List(None, outs), padding=(1, 1), shared=shared)
    for n in range(3):
        i, o = int(ins[n // shared]), int(outs[n // shared])
        exact = conv2d(x[n : n + 1, :i], weight[:o, :i], padding=1)[0]
        torch.testing.assert_close(y[n, :o], exact, rtol=1e-4, atol=1e-4)
        assert (y[n, o:] == 0).all()


@pytest.mark.parametrize("pixels", [4, 30])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("splits", "programs"), [(1, 0), (1, 1), (2, 0)])
def test_every_element_is_written_once(splits: int, programs: int, packed: bool, shared: int, pixels: int):
    """With y as its own residual, zeros for weights and ones for biases, an element counts how often it is written."""
    from gatedkernels.ops.ragged import launch
    from gatedkernels.ops.ragged.configurations import Configuration, Tile

    n, k, untouched = 4, 70, 7.0
    for density in (0.0, 0.3, 1.0):
        lists = launch.plan(draw(n, k, density), shared)
        x, weight, bias = torch.zeros(n, 1, pixels, 1, device=DEVICE), randn(k, 1, 1, 1), torch.ones(k, device=DEVICE)
        memory = launch.packed_like(x, k, pixels, 1).fill_(0)
        room = memory.as_strided((n, pixels, memory.stride(3)), (memory.stride(0), memory.stride(3), 1))
        listed = torch.arange(room.shape[2], device=DEVICE) < lists.counts.repeat_interleave(shared)[:n, None]
        room.copy_(torch.where(listed[:, None], 0.0, untouched).expand_as(room))
        y = memory if packed else torch.zeros(n, pixels, k, device=DEVICE).mT[..., None]
        launch.convolve(
            x, weight, bias, y, outs=lists, residual=y, packed_out=packed, shared=shared,
            configuration=Configuration(Tile(16, 32, 16, 4, 2), splits, programs),
        )  # fmt: skip
        if packed:
            step = listed.logical_or(torch.arange(room.shape[2], device=DEVICE) < _up(lists.counts, shared)[:n, None])
            expected = torch.where(listed, 1.0, torch.where(step, 0.0, untouched))
            assert torch.equal(room, expected[:, None].expand_as(room))
        else:
            open_ = torch.zeros(len(lists.counts), k, dtype=torch.bool, device=DEVICE)
            open_.scatter_(1, lists.indices.long(), active(*lists[:2]))
            expected = open_.repeat_interleave(shared, 0)[:n].float()
            assert torch.equal(y[..., 0], expected[..., None].expand(n, k, pixels))


def _up(count: Tensor, shared: int) -> Tensor:
    return ((count + 15) // 16 * 16).repeat_interleave(shared)


def test_unpacked_is_what_was_packed(images):
    from gatedkernels.ops.ragged import launch

    for layout in ("contiguous", "channels_last", "sliced"):
        mask = draw(2, 40, 0.4)
        x = images((2, 40, 9, 8), layout, device=DEVICE)
        found = launch.plan(mask)
        packed = launch.pack(poisoned(x, mask), found)
        assert torch.equal(unpack(packed, *found[:2]), torch.where(mask[:, :, None, None], x, 0))


def test_same_bits_every_time():
    x, weight = randn(2, 20, 9, 8).requires_grad_(), randn(20, 20, 3, 3).requires_grad_()
    mask = draw(2, 20, 0.4)
    runs = []
    for _ in range(2):
        x.grad = weight.grad = None
        y = gk.gated_conv2d(x, weight, None, None, mask, padding=1, backend="triton")
        y.square().sum().backward()
        runs.append((y.detach(), x.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_operator_is_well_formed():
    ones = (1, 1)
    tensors = randn(2, 6, 4, 4).requires_grad_(), randn(5, 6, 3, 3).requires_grad_(), randn(5).requires_grad_()
    arguments = (*tensors, None, draw(2, 5, 0.5), ones, ones, ones, 1, False, "triton", 2.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gatedkernels.gated_conv2d.default, arguments, test_utils=tests)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [(12, 37, 37), (20, 16, 70)], ids=str)
def test_blocks_from_packed_weights(sizes: tuple[int, int, int], stride: int):
    n, (c, m, k), h, w = 3, sizes, 5, 4
    size = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    x, residual = randn(n, c, h, w).to(memory_format=torch.channels_last), randn(*size)
    weight1, bias1, weight2, bias2 = randn(m, c, 3, 3), randn(m), randn(k, m, 3, 3), randn(k)
    own = (packed.pack_rows(weight1), bias1, packed.pack_blocks(weight2), bias2, None, None)
    for density in (0.0, 0.4, 1.0):
        mask = draw(n, m, density)
        y = packed.block_on_gpu(x, *own, mask, residual, stride)
        exact = gk.gated_block(
            x, weight1, bias1, weight2, bias2, mask, residual=residual, stride=stride, backend="reference"
        )
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_residual_blocks_from_packed_weights(given: bool, stride: int):
    n, c, k, hidden = 2, 12, 20 if stride == 2 else 12, 4
    x = randn(n, c, 6, 5).to(memory_format=torch.channels_last)
    gate = randn(hidden, c), randn(hidden), randn(k, hidden), randn(k)
    weights = packed.pack_rows(randn(k, c, 3, 3)), randn(k), packed.pack_blocks(randn(k, k, 3, 3)), randn(k)
    shortcut = (packed.pack_blocks(randn(k, c, 1, 1)), randn(k)) if stride == 2 else (None, None)
    arguments = (x, *gate, *weights, None, None, *shortcut, draw(n, k, 0.5) if given else None, stride)
    own, exact = packed.residual_on_gpu(*arguments), packed.DEFINITIONS["packed_residual"](*arguments)
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [2, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_similar_samples_share_lists(density: float, shared: int):
    from gatedkernels.ops.ragged.gated import gated_block

    n, c = 7, 20
    mask = draw(3, c, density)[torch.randint(3, (n,), device=DEVICE)] ^ draw(n, c, 0.05)
    tensors = randn(n, c, 3, 4), randn(c, c, 3, 3), randn(c), randn(c, c, 3, 3), randn(c)
    exact = gk.gated_block(*tensors, mask, residual=tensors[0], backend="reference")
    for similar in (False, True):
        y = gated_block(*tensors, mask, tensors[0], (1, 1), shared, similar)
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_the_operator_of_similar_samples():
    n, c = 7, 20
    mask = draw(2, c, 0.4)[torch.arange(n, device=DEVICE) % 2] ^ draw(n, c, 0.05)
    tensors = randn(n, c, 3, 4), randn(c, c, 3, 3), randn(c), randn(c, c, 3, 3), randn(c)
    for stride in (1, 2):
        options = {"residual": tensors[0] if stride == 1 else None, "stride": stride}
        y = gk.gated_block(*tensors, mask, shared=4, backend="triton", **options)
        exact = gk.gated_block(*tensors, mask, shared=4, backend="reference", **options)
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
        assert y.stride() == exact.stride()
    arguments = (*tensors, mask, None, (2, 2), 4)
    torch.library.opcheck(torch.ops.gatedkernels.shared_block.default, arguments)
    recorded = tensors[1].clone().requires_grad_()
    gk.gated_block(tensors[0], recorded, *tensors[2:], mask, shared=4, backend="triton").sum().backward()
    assert recorded.grad.any()


@pytest.mark.parametrize("shared", [1, 2, 3, 8])
@pytest.mark.parametrize(("samples", "count"), [(1, 5), (9, 1), (20, 4), (6, 40)])
def test_groups_of_equal_codes(samples: int, count: int, shared: int):
    """Every sample has one place, in a group of its own code."""
    from gatedkernels.ops.ragged.groups import equal_groups
    from gatedkernels.ops.ragged.groups_reference import equal_groups_reference

    codes = torch.randint(count, (samples,), device=DEVICE)
    order, lists = equal_groups(codes, count, shared)
    for own, exact in zip((order, lists), equal_groups_reference(codes, count, shared), strict=True):
        assert torch.equal(own, exact)
    strange = equal_groups(codes - 3 * count, count, shared)  # no code of the table: its remainder
    assert all(torch.equal(*pair) for pair in zip(strange, (order, lists), strict=True))
    assert len(order) == len(lists) * shared
    assert len(lists) == samples // shared + min(count, samples)
    filled = order < samples
    assert sorted(order[filled].tolist()) == list(range(samples))
    assert torch.equal(codes[order[filled].long()], lists.repeat_interleave(shared)[filled].long())


@pytest.mark.parametrize("shared", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_a_codebook(stride: int, shared: int):
    from gatedkernels.ops.ragged.gated import coded_block

    n, c, m, k = 7, 12, 37, 18
    tensors = randn(n, c, 5, 4), randn(m, c, 3, 3), randn(m), randn(k, m, 3, 3), randn(k)
    table, codes = draw(4, m, 0.4), torch.tensor([0, 3, 3, 0, 1, 3, 3], device=DEVICE)
    table[1] = False
    residual = randn(n, k, 5, 4) if stride == 1 else None
    y = coded_block(*tensors, table, codes, residual, (stride, stride), shared)
    exact = gk.gated_block(*tensors, table[codes], residual=residual, stride=stride, backend="reference")
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_the_operator_of_a_codebook():
    x, weights = randn(4, 6, 5, 4), (randn(16, 6, 3, 3), randn(16), randn(9, 16, 3, 3), None)
    table, codes = draw(3, 16, 0.5), torch.tensor([2, 0, 2, 1], device=DEVICE)
    y = gk.ops.coded_block(x, *weights, table, codes, stride=2, backend="triton")
    exact = gk.ops.coded_block(x, *weights, table, codes, stride=2, backend="reference")
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    assert y.stride() == exact.stride()
    arguments = (x, *weights, table, codes, None, (2, 2))
    torch.library.opcheck(torch.ops.gatedkernels.coded_block.default, arguments)
    recorded = weights[0].clone().requires_grad_()
    gk.ops.coded_block(x, recorded, *weights[1:], table, codes, backend="triton").sum().backward()
    assert recorded.grad.any()
