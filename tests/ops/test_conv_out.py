"""The operation ``conv_out``: only the active output channels, packed."""

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

# N, C, K, H, W, side of the window, stride: what the CPU kernel serves
SHAPES = [
    (2, 64, 64, 8, 8, 3, 1),
    (3, 70, 130, 7, 9, 3, 2),
    (1, 3, 40, 17, 15, 3, 1),
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
    return torch.randn(k, c, side, side).to(dtype), torch.randn(k).to(dtype), torch.rand(n, k) < density


def definition(mask: Tensor, relu: bool = False, **options: Any) -> Callable[..., Tensor]:
    """The convolution's channels, sample by sample: the active ones first, zeros after them."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = conv2d(x, weight, bias, **options)
        y = y.relu() if relu else y
        return torch.stack([torch.cat([a[m], torch.zeros_like(a[~m])]) for a, m in zip(y, mask, strict=True)])

    return run


def operation(mask: Tensor, backend: str = "auto", **options: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias: gk.conv_out(x, weight, bias, *gk.plan(mask), backend=backend, **options)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": (2, 1), "dilation": 2}], ids=str)
def test_reference_matches_definition(options: dict[str, Any], density: float, relu: bool, images):
    weight, bias, mask = make(3, 5, 6, 3, density, torch.float64)
    x = images((3, 5, 8, 7), "contiguous", torch.float64)
    y = operation(mask, "reference", relu=relu, **options)(x, weight, bias)
    torch.testing.assert_close(y, definition(mask, relu, **options)(x, weight, bias))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "dilation": 2, "padding": 1}], ids=str)
def test_reference_gradients(options: dict[str, Any], relu: bool):
    weight, bias, mask = make(2, 3, 5, 3, 0.5, torch.float64)
    tensors = [t.requires_grad_() for t in (torch.randn(2, 3, 5, 4).double(), weight, bias)]
    assert torch.autograd.gradcheck(operation(mask, "reference", relu=relu, **options), tensors)


@needs_cpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], density: float, relu: bool, layout: str, images, compare):
    n, c, k, h, w, side, stride = shape
    weight, bias, mask = make(n, c, k, side, density)
    options = {"stride": stride, "padding": side // 2, "relu": relu}
    compare(
        operation(mask, "cpu", **options), definition(mask, **options), [images((n, c, h, w), layout), weight, bias]
    )


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_kernel_serves_any_size(data: st.DataObject, images, compare):
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("N", 4), ("C", 70), ("K", 70)))
    h, w = data.draw(st.integers(1, 20), "H"), data.draw(st.integers(1, 20), "W")
    side, stride = data.draw(st.sampled_from([1, 3]), "window"), data.draw(st.sampled_from([1, 2]), "stride")
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias, mask = make(n, c, k, side, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "density"))
    options = {"stride": stride, "padding": side // 2, "relu": data.draw(st.booleans(), "relu")}
    x = images((n, c, h, w), data.draw(st.sampled_from(["contiguous", "channels_last", "sliced"]), "layout"))
    compare(operation(mask, "cpu", **options), definition(mask, **options), [x, weight, None], rounding=8)
    compare(operation(mask, "cpu", **options), definition(mask, **options), [x, weight, bias], rounding=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_auto_serves_every_dtype(dtype: torch.dtype, relu: bool, layout: str, images, compare):
    weight, bias, mask = make(2, 6, 9, 3, 0.5, dtype)
    options = {"stride": 2, "padding": 2, "dilation": 2, "relu": relu}
    tensors = [images((2, 6, 9, 8), layout, dtype), weight, bias]
    compare(operation(mask, **options), definition(mask, **options), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_behind_the_active_channels_are_never_read(backend: str, relu: bool, images):
    weight, bias, mask = make(3, 9, 20, 3, 0.5)
    tensors = [t.requires_grad_() for t in (images((3, 9, 5, 6)), weight, bias)]
    y = operation(mask, backend, padding=1, relu=relu)(*tensors)
    dy = torch.randn_like(y)
    behind = torch.arange(20) >= mask.sum(1, keepdim=True)
    clean = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    poisoned = torch.autograd.grad(y, tensors, torch.where(behind[..., None, None], torch.nan, dy))
    for expected, actual in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_through_the_relu(backend: str, images):
    weight, bias, _ = make(2, 9, 20, 3, 0.5)
    x = images((2, 9, 5, 6))
    x[1, 4, 2, 3] = torch.nan
    open_ = torch.ones(2, 20, dtype=torch.bool)
    y = operation(open_, backend, padding=1, relu=True)(x, weight, bias)
    assert torch.equal(y.isnan(), conv2d(x, weight, bias, padding=1).isnan())


def test_autocast(images, gradients):
    weight, bias, mask = make(2, 8, 6, 3, 0.5)
    tensors = [images((2, 8, 6, 6)), weight, bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(operation(mask, padding=1), tensors)
        expected = gradients(definition(mask, padding=1), tensors)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 3]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


X, WEIGHT, BIAS = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)
INDEX, COUNT = torch.arange(6, dtype=torch.int32).repeat(2, 1), torch.full((2,), 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \(N, C, H, W\), got \(4, 5, 5\)"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"weight": WEIGHT[:, :2]}, ValueError, r"weight must have shape \(6, 4, 3, 3\), got \(6, 2, 3, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have the dtype of x"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"index": INDEX.long()}, TypeError, r"index must be an int32 tensor, got torch\.int64"),
        ({"index": [[0]]}, TypeError, "index must be an int32 tensor, got list"),
        ({"index": INDEX[:, :4]}, ValueError, r"index must have shape \(2, 6\), got \(2, 4\)"),
        ({"index": INDEX.to("meta")}, ValueError, "index must be on the device of the images, cpu, got meta"),
        ({"count": COUNT[:1]}, ValueError, r"count must have shape \(2,\), got \(1,\)"),
        ({"count": COUNT.float()}, TypeError, r"count must be an int32 tensor, got torch\.float32"),
        ({"x": X[..., :1]}, ValueError, r"x must be at least as large as the window \(3, 3\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"backend": "dense"}, ValueError, "backend must be one of auto, reference, cpu, triton for this operation"),
        ({"backend": "best"}, ValueError, "backend must be one of .*, got 'best'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        gk.conv_out(**{"x": X, "weight": WEIGHT, "bias": BIAS, "index": INDEX, "count": COUNT, **change})
