"""The operation ``conv_in``: reads packed channels and the filters that belong to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.plan.reference import pack

# N, C, K, H, W, side of the window, stride: what the CPU kernel serves
SHAPES = [
    (2, 64, 64, 8, 8, 3, 1),
    (3, 70, 130, 7, 9, 3, 2),
    (1, 40, 3, 17, 15, 3, 1),
    (2, 33, 25, 5, 6, 1, 1),
    (2, 17, 31, 6, 7, 1, 2),
    (2, 5, 3, 2, 1, 3, 2),
    (1, 1, 1, 1, 1, 3, 1),
]
DENSITIES = [0.0, 0.4, 1.0]

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def make(n: int, c: int, k: int, side: int, density: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Filters, bias, mask."""
    return torch.randn(k, c, side, side).to(dtype), torch.randn(k).to(dtype), torch.rand(n, c) < density


def definition(mask: Tensor, **options: Any) -> Callable[..., Tensor]:
    """Sample by sample, the convolution of the active channels with their filters."""

    def run(packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.stack([
            # A closed channel at the end keeps the sample from being empty.
            conv2d(
                torch.cat([x[: m.sum()], torch.zeros_like(x[:1])])[None],
                torch.cat([weight[:, m], weight[:, :1]], 1),
                bias,
                **options,
            )[0]
            for x, m in zip(packed, mask, strict=True)
        ])  # fmt: skip

    return run


def operation(mask: Tensor, backend: str = "auto", **options: Any) -> Callable[..., Tensor]:
    return lambda packed, weight, bias: gk.conv_in(packed, weight, bias, *gk.plan(mask), backend=backend, **options)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": (2, 1), "dilation": 2}], ids=str)
def test_reference_matches_definition(options: dict[str, Any], density: float, images):
    weight, bias, mask = make(3, 5, 6, 3, density, torch.float64)
    packed = images((3, 5, 8, 7), "contiguous", torch.float64)
    y = operation(mask, "reference", **options)(packed, weight, bias)
    torch.testing.assert_close(y, definition(mask, **options)(packed, weight, bias))


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "dilation": 2, "padding": 1}], ids=str)
def test_reference_gradients(options: dict[str, Any]):
    weight, bias, mask = make(2, 5, 3, 3, 0.5, torch.float64)
    tensors = [t.requires_grad_() for t in (torch.randn(2, 5, 5, 4).double(), weight, bias)]
    assert torch.autograd.gradcheck(operation(mask, "reference", **options), tensors)


@needs_cpu
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], density: float, layout: str, images, compare):
    n, c, k, h, w, side, stride = shape
    weight, bias, mask = make(n, c, k, side, density)
    options = {"stride": stride, "padding": side // 2}
    packed = images((n, c, h, w), layout)
    compare(operation(mask, "cpu", **options), definition(mask, **options), [packed, weight, bias])


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_kernel_serves_any_size(data: st.DataObject, images, compare):
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("N", 4), ("C", 70), ("K", 70)))
    h, w = data.draw(st.integers(1, 20), "H"), data.draw(st.integers(1, 20), "W")
    side, stride = data.draw(st.sampled_from([1, 3]), "window"), data.draw(st.sampled_from([1, 2]), "stride")
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias, mask = make(n, c, k, side, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "density"))
    bias = data.draw(st.sampled_from([bias, None]), "bias")
    options = {"stride": stride, "padding": side // 2}
    packed = images((n, c, h, w), data.draw(st.sampled_from(["contiguous", "channels_last", "sliced"]), "layout"))
    compare(operation(mask, "cpu", **options), definition(mask, **options), [packed, weight, bias], rounding=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_serves_every_dtype(dtype: torch.dtype, layout: str, images, compare):
    weight, bias, mask = make(2, 6, 9, 3, 0.5, dtype)
    options = {"stride": 2, "padding": 2, "dilation": 2}
    tensors = [images((2, 6, 9, 8), layout, dtype), weight, bias]
    compare(operation(mask, **options), definition(mask, **options), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [1, 3])
def test_what_lies_behind_the_active_channels_is_never_read(backend: str, side: int, images, gradients):
    weight, bias, mask = make(3, 20, 33, side, 0.5)
    clean = images((3, 20, 5, 6))
    behind = (torch.arange(20) >= mask.sum(1, keepdim=True))[..., None, None]
    run = operation(mask, backend, padding=side // 2)
    expected = gradients(run, [clean, weight, bias])
    actual = gradients(run, [torch.where(behind, torch.nan, clean), weight, bias])
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e)
    assert not actual[1].where(behind, 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_dense_input_gradient_fills_the_closed_positions(backend: str, stride: int, images, gradients):
    weight, bias, mask = make(3, 12, 8, 3, 0.5)
    index, count = gk.plan(mask)
    x = torch.where(mask[..., None, None], images((3, 12, 6, 5)), 0)
    packed = pack(x, index, count)
    options = {"padding": 1, "stride": stride}
    dense = gradients(lambda x, w, b: conv2d(x, w, b, **options), [x, weight, bias])
    every = pack(dense[1], index, torch.full_like(count, 12))  # in the order of the plan, the closed channels last
    _, dpacked, dweight, dbias = gradients(
        operation(mask, backend, dense_input_grad=True, **options), [packed, weight, bias]
    )
    torch.testing.assert_close(dpacked, every, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dweight, dense[2], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dbias, dense[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chain_of_both_operations(backend: str, dtype: torch.dtype, images):
    if backend == "cpu" and dtype == torch.float64:
        backend = "auto"
    weight1, bias1, _ = make(2, 9, 14, 3, 0.5, dtype)
    weight2, bias2, mask = make(2, 14, 11, 3, 0.5, dtype)
    x, plan = images((2, 9, 7, 5), "contiguous", dtype), gk.plan(mask)
    hidden = gk.conv_out(x, weight1, bias1, *plan, stride=2, padding=1, relu=True, backend=backend)
    y = gk.conv_in(hidden, weight2, bias2, *plan, padding=1, backend=backend)
    between = torch.where(mask[..., None, None], conv2d(x, weight1, bias1, 2, 1).relu(), 0)
    torch.testing.assert_close(y, conv2d(between, weight2, bias2, padding=1), rtol=1e-4, atol=1e-4)


def test_autocast(images, gradients):
    weight, bias, mask = make(2, 8, 6, 3, 0.5)
    tensors = [images((2, 8, 6, 6)), weight, bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(operation(mask, padding=1), tensors)
        expected = gradients(definition(mask, padding=1), tensors)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 3]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05)


PACKED, WEIGHT, BIAS = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)
INDEX, COUNT = torch.arange(4, dtype=torch.int32).repeat(2, 1), torch.full((2,), 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": PACKED[0]}, ValueError, r"packed must have shape \(N, C, H, W\), got \(4, 5, 5\)"),
        ({"packed": 3}, TypeError, "packed must be a tensor, got int"),
        ({"weight": WEIGHT[:, :2]}, ValueError, r"weight must have shape \(6, 4, 3, 3\), got \(6, 2, 3, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have the dtype of packed"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"index": INDEX.long()}, TypeError, r"index must be an int32 tensor, got torch\.int64"),
        ({"index": INDEX[:, :2]}, ValueError, r"index must have shape \(2, 4\), got \(2, 2\)"),
        ({"count": COUNT[:1]}, ValueError, r"count must have shape \(2,\), got \(1,\)"),
        ({"count": None}, TypeError, "count must be an int32 tensor, got NoneType"),
        ({"packed": PACKED[..., :1]}, ValueError, r"x must be at least as large as the window \(3, 3\)"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, reference, cpu, triton for this operation"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        gk.conv_in(**{"packed": PACKED, "weight": WEIGHT, "bias": BIAS, "index": INDEX, "count": COUNT, **change})
