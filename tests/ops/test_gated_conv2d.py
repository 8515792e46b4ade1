"""The operation ``gated_conv2d``: its reference against the definition, its kernels against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels import _extension

# N, C, K, H, W, side of the window, stride: what the CPU kernels serve
SHAPES = [
    (2, 64, 64, 8, 8, 3, 1),
    (1, 3, 40, 33, 31, 3, 1),
    (3, 70, 130, 7, 9, 3, 2),
    (2, 33, 65, 5, 6, 1, 1),
    (2, 17, 31, 6, 7, 1, 2),
    (4, 130, 20, 4, 4, 3, 1),
    (2, 5, 3, 2, 1, 3, 2),
    (2, 5, 3, 1, 1, 1, 2),
    (1, 1, 1, 1, 1, 3, 1),
]
# Densities of in_mask and out_mask; None: no mask
MASKS = [(None, None), (0.5, None), (None, 0.5), (0.3, 0.4), (0.0, 0.5), (0.5, 0.0), (1.0, 1.0)]
# Only `auto` and the reference serve these: C, K, size of the window, and the rest
GENERAL = {
    "7x7": (3, 8, (7, 7), {"stride": 2, "padding": 3}),
    "dilated": (6, 8, (3, 3), {"dilation": 2, "padding": 2}),
    "grouped": (8, 12, (3, 3), {"groups": 4, "padding": 1}),
    "depthwise": (8, 8, (3, 3), {"groups": 8, "padding": 1, "stride": 2}),
    "uneven": (4, 5, (2, 3), {"stride": (1, 3), "padding": (2, 0), "dilation": (3, 2)}),
    "unpadded": (5, 4, (3, 3), {}),
}

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", "dense", pytest.param("cpu", marks=needs_cpu)]


def make_mask(n: int, channels: int, density: float | None) -> Tensor | None:
    return None if density is None else torch.rand(n, channels) < density


def make_weights(k: int, c: int, *size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(k, c, *size).to(dtype), torch.randn(k).to(dtype)


def where(mask: Tensor | None, x: Tensor) -> Tensor:
    return x if mask is None else torch.where(mask[:, :, None, None], x, 0)


def definition(in_mask: Tensor | None, out_mask: Tensor | None, **options: Any) -> Callable[..., Tensor]:
    """The masked convolution as anybody would write it, with the gradients that autograd finds."""
    return lambda x, w, b: where(out_mask, conv2d(where(in_mask, x), w, b, **options))


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": (0, 2), "dilation": (1, 2)}], ids=str)
def test_reference_matches_definition(masks: tuple[float | None, float | None], options: dict[str, Any]):
    x, (weight, bias) = torch.randn(3, 5, 7, 6).double(), make_weights(4, 5, 3, 3, dtype=torch.float64)
    in_mask, out_mask = make_mask(3, 5, masks[0]), make_mask(3, 4, masks[1])
    y = gk.gated_conv2d(x, weight, bias, in_mask, out_mask, backend="reference", **options)
    expected = torch.zeros_like(y)
    for n in range(3):
        read = torch.ones(5, dtype=torch.bool) if in_mask is None else in_mask[n]
        for k in range(4):
            if out_mask is None or out_mask[n, k]:
                expected[n, k] = bias[k]
                if read.any():
                    expected[n, k] += conv2d(x[n : n + 1, read], weight[k : k + 1, read], **options)[0, 0]
    torch.testing.assert_close(y, expected)
    if out_mask is not None:
        assert not y[~out_mask].any()


@pytest.mark.parametrize("masks", [(None, None), (0.5, None), (None, 0.5), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}], ids=str)
def test_reference_gradients(masks: tuple[float | None, float | None], options: dict[str, Any]):
    groups = options.get("groups", 1)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 4, 5, 4), (6, 4 // groups, 3, 3), (6,)]
    )
    in_mask, out_mask = make_mask(2, 4, masks[0]), make_mask(2, 6, masks[1])

    def run(*tensors: Tensor) -> Tensor:
        return gk.gated_conv2d(*tensors, in_mask, out_mask, backend="reference", **options)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@needs_cpu
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], masks: tuple[float | None, float | None], layout: str, images, compare):
    n, c, k, h, w, side, stride = shape
    weight, bias = make_weights(k, c, side, side)
    in_mask, out_mask = make_mask(n, c, masks[0]), make_mask(n, k, masks[1])
    options = {"stride": stride, "padding": side // 2}

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gk.gated_conv2d(x, weight, bias, in_mask, out_mask, backend="cpu", **options)

    x = images((n, c, h, w), layout)
    compare(run, definition(in_mask, out_mask, **options), [x, weight, bias])


@needs_cpu
@pytest.mark.parametrize("shape", [(1, 512, 40, 4, 4, 3, 1), (1, 64, 512, 4, 4, 3, 1)], ids=["in", "out"])
def test_kernel_sums_many_channels(shape: tuple[int, ...], images, compare):
    test_kernel(shape, (1.0, None), "contiguous", images, compare)


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_kernel_serves_any_size(data: st.DataObject, images, compare):
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("N", 5), ("C", 70), ("K", 70)))
    h, w = data.draw(st.integers(1, 20), "H"), data.draw(st.integers(1, 20), "W")
    side, stride = data.draw(st.sampled_from([1, 3]), "window"), data.draw(st.sampled_from([1, 2]), "stride")
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"]), "layout")
    densities = st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])
    in_density, out_density = data.draw(densities, "in"), data.draw(densities, "out")
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias = make_weights(k, c, side, side)
    bias = data.draw(st.sampled_from([bias, None]), "bias")
    in_mask, out_mask = make_mask(n, c, in_density), make_mask(n, k, out_density)
    options = {"stride": stride, "padding": side // 2}
    dense_input_grad = in_density is None and data.draw(st.booleans(), "dense_input_grad")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rest = {"dense_input_grad": dense_input_grad, "backend": "cpu", **options}
        return gk.gated_conv2d(x, weight, bias, in_mask, out_mask, **rest)

    x = images((n, c, h, w), layout)
    compare(run, definition(in_mask, out_mask, **options), [x, weight, bias], rounding=8)


@pytest.mark.parametrize("general", GENERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("masks", [(0.5, 0.5), (None, 0.5), (0.5, None)], ids=str)
def test_auto_serves_every_geometry(
    general: str, dtype: torch.dtype, masks: tuple[float | None, float | None], images, compare
):
    c, k, size, options = GENERAL[general]
    weight, bias = make_weights(k, c // options.get("groups", 1), *size, dtype=dtype)
    in_mask, out_mask = make_mask(2, c, masks[0]), make_mask(2, k, masks[1])
    x = images((2, c, 11, 10), "channels_last", dtype)
    compare(
        lambda x, w, b: gk.gated_conv2d(x, w, b, in_mask, out_mask, **options),
        definition(in_mask, out_mask, **options),
        [x, weight, bias],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_auto_serves_every_dtype(shape: tuple[int, ...], dtype: torch.dtype, layout: str, images, compare):
    n, c, k, h, w, side, stride = shape
    weight, bias = make_weights(k, c, side, side, dtype=dtype)
    in_mask, out_mask = make_mask(n, c, 0.5), make_mask(n, k, 0.6)
    options = {"stride": stride, "padding": side // 2}
    compare(
        lambda x, w, b: gk.gated_conv2d(x, w, b, in_mask, out_mask, **options),
        definition(in_mask, out_mask, **options),
        [images((n, c, h, w), layout, dtype), weight, bias],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, 8])
def test_group_is_one_decision_for_neighbours(backend: str, group: int, images):
    x, (weight, bias) = images((3, 16, 5, 5)), make_weights(24, 16, 3, 3)
    in_mask, out_mask = torch.rand(3, 16 // group) < 0.5, torch.rand(3, 24 // group) < 0.5
    y = gk.gated_conv2d(x, weight, bias, in_mask, out_mask, padding=1, group=group, backend=backend)
    every = [mask.repeat_interleave(group, 1) for mask in (in_mask, out_mask)]
    assert torch.equal(y, gk.gated_conv2d(x, weight, bias, *every, padding=1, backend=backend))
    torch.testing.assert_close(y, definition(*every, padding=1)(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_empty_batch(backend: str, masks: tuple[float | None, float | None], gradients):
    in_mask, out_mask = make_mask(0, 4, masks[0]), make_mask(0, 6, masks[1])
    weight, bias = make_weights(6, 4, 3, 3)
    y, dx, dweight, dbias = gradients(
        lambda x, w, b: gk.gated_conv2d(x, w, b, in_mask, out_mask, stride=2, padding=1, backend=backend),
        [torch.randn(0, 4, 5, 7), weight, bias],
    )
    assert y.shape == (0, 6, 3, 4)
    assert dx.shape == (0, 4, 5, 7)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_closed(backend: str, images, gradients):
    closed = torch.zeros(2, 8, dtype=torch.bool)
    weight, bias = make_weights(8, 8, 3, 3)
    for masks in ((None, closed), (closed, closed)):
        results = gradients(
            lambda x, w, b, masks=masks: gk.gated_conv2d(x, w, b, *masks, padding=1, backend=backend),
            [images((2, 8, 5, 5)), weight, bias],
        )
        assert all(torch.equal(result, torch.zeros_like(result)) for result in results)
    y = gk.gated_conv2d(images((2, 8, 5, 5)), weight, bias, closed, padding=1, backend=backend)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("out_density", [None, 0.5])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_closed_channels_are_never_read(
    backend: str, side: int, out_density: float | None, poison: float, layout: str, images, gradients
):
    in_mask, out_mask = make_mask(3, 21, 0.5), make_mask(3, 40, out_density)
    weight, bias = make_weights(40, 21, side, side)
    clean = images((3, 21, 5, 6), layout)
    results = [
        gradients(
            lambda x, w, b: gk.gated_conv2d(x, w, b, in_mask, out_mask, padding=side // 2, backend=backend),
            [x, weight, bias],
        )
        for x in (clean, torch.where(in_mask[..., None, None], clean, poison))
    ]
    for name, expected, actual in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert actual.isfinite().all(), name
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not results[1][1][~in_mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_closed_outputs_are_never_read(backend: str, images):
    out_mask = make_mask(3, 20, 0.5)
    weight, bias = make_weights(20, 9, 3, 3)
    tensors = [t.requires_grad_() for t in (images((3, 9, 5, 6)), weight, bias)]
    y = gk.gated_conv2d(*tensors, None, out_mask, padding=1, backend=backend)
    dy = torch.randn_like(y)
    clean = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    poisoned = torch.autograd.grad(y, tensors, torch.where(out_mask[..., None, None], dy, torch.nan))
    for expected, actual in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [(None, 0.6), (0.6, None), (0.6, 0.6)], ids=str)
def test_nan_in_open_channels_shows(backend: str, masks: tuple[float | None, float | None], images):
    in_mask, out_mask = make_mask(2, 8, masks[0]), make_mask(2, 8, masks[1])
    if in_mask is not None:
        in_mask[0, 3] = True
    x, (weight, bias) = images((2, 8, 5, 5)), make_weights(8, 8, 3, 3)
    x[0, 3, 2, 2] = torch.nan
    y = gk.gated_conv2d(x, weight, bias, in_mask, out_mask, padding=1, backend=backend)
    assert torch.equal(y.isnan(), definition(in_mask, out_mask, padding=1)(x, weight, bias).isnan())
    assert y.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_outputs_and_unused_filters(backend: str, images, gradients):
    out_mask = make_mask(4, 24, 0.5)
    out_mask[:, [3, 17]] = False
    x, (weight, bias) = images((4, 9, 6, 6)), make_weights(24, 9, 3, 3)
    order = torch.randperm(24)

    def run(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor = out_mask) -> Tensor:
        return gk.gated_conv2d(x, weight, bias, None, mask, padding=1, backend=backend)

    permuted = run(x, weight[order], bias[order], out_mask[:, order])
    torch.testing.assert_close(permuted, run(x, weight, bias)[:, order], rtol=1e-4, atol=1e-4)
    _, _, dweight, dbias = gradients(run, [x, weight, bias])
    assert not dweight[[3, 17]].any()
    assert not dbias[[3, 17]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str, images):
    x, (weight, bias) = images((2, 5, 4, 4)).requires_grad_(), make_weights(6, 5, 3, 3)
    y = gk.gated_conv2d(x, weight.requires_grad_(), bias, padding=1, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        dx.sum().backward()


# -- gradients of gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_density", [None, 0.5])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"groups": 2}], ids=str)
def test_gate_gradients_are_those_of_the_masked_dense_network(out_density: float | None, options: dict[str, Any]):
    groups = options.get("groups", 1)
    x, (weight, bias) = torch.randn(3, 6, 5, 7).double(), make_weights(8, 6 // groups, 3, 3, dtype=torch.float64)
    hard, out_mask = torch.rand(3, 6) < 0.5, make_mask(3, 8, out_density)

    def gate_gradient(convolve: Callable[[Tensor], Tensor]) -> Tensor:
        gate = hard.double().requires_grad_()
        y = convolve(x * gate[..., None, None])
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
        return gate.grad

    expected = gate_gradient(lambda x: where(out_mask, conv2d(x, weight, bias, **options)))
    run = {dense: lambda x, d=dense: gk.gated_conv2d(x, weight, bias, hard, out_mask, dense_input_grad=d, **options)
           for dense in (True, False)}  # fmt: skip
    torch.testing.assert_close(gate_gradient(run[True]), expected)
    # Without it the closed gates hear nothing: the option is needed, and this test can fail.
    torch.testing.assert_close(gate_gradient(run[False]), torch.where(hard, expected, 0))
    assert expected[~hard].any()


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
@pytest.mark.parametrize("out_density", [None, 0.5])
def test_dense_input_gradient_of_the_kernel(
    shape: tuple[int, ...], out_density: float | None, images, gradients, assert_within_budget
):
    n, c, k, h, w, side, stride = shape
    in_mask, out_mask = make_mask(n, c, 0.5), make_mask(n, k, out_density)
    x, (weight, bias) = where(in_mask, images((n, c, h, w))), make_weights(k, c, side, side)
    options = {"stride": stride, "padding": side // 2}
    tensors = [x, weight, bias]
    actual = gradients(
        lambda x, w, b: gk.gated_conv2d(x, w, b, in_mask, out_mask, dense_input_grad=True, backend="cpu", **options),
        tensors,
    )
    unmasked = definition(None, out_mask, **options)
    exact = gradients(unmasked, [t.double() for t in tensors], torch.float32)
    last = [x.contiguous(memory_format=torch.channels_last), weight, bias]
    for a, e, *own in zip(actual, exact, gradients(unmasked, tensors), gradients(unmasked, last), strict=True):
        assert_within_budget(a, e, *own)


# -- dtypes and layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, images, gradients):
    in_mask, out_mask = make_mask(2, 8, 0.5), make_mask(2, 12, 0.5)
    tensors = [images((2, 8, 6, 6)), *make_weights(12, 8, 3, 3)]
    with torch.autocast("cpu", dtype=dtype):
        actual = gradients(lambda *t: gk.gated_conv2d(*t, in_mask, out_mask, padding=1), tensors)
        expected = gradients(definition(in_mask, out_mask, padding=1), tensors)
    assert actual[0].dtype == dtype
    assert [gradient.dtype for gradient in actual[1:]] == [torch.float32] * 3
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_leaves_float64_alone(images):
    x, (weight, bias) = images((2, 3, 4, 4), "contiguous", torch.float64), make_weights(5, 3, 3, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gk.gated_conv2d(x, weight, bias).dtype == torch.float64


def significant_strides(x: Tensor) -> list[int]:
    """Strides along the dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1] if x.numel() else []


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 1, 5, 6), (1, 8, 1, 1), (2, 8, 1, 6), (0, 8, 5, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 12])
@pytest.mark.parametrize("density", [None, 0.0, 0.5, 1.0])
def test_memory_format_is_a_function_of_the_input_alone(
    shape: tuple[int, ...], k: int, density: float | None, layout: str, images
):
    x, (weight, _) = images(shape, layout), make_weights(k, shape[1], 3, 3)
    out_mask = make_mask(shape[0], k, density)
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    expected = torch.empty(shape[0], k, *shape[2:]).to(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )
    for backend in ("reference", "dense", "auto", *(["cpu"] if _extension.CPU_ERROR is None else [])):
        leaf = x.detach().requires_grad_()
        y = gk.gated_conv2d(leaf, weight, None, None, out_mask, padding=1, backend=backend)
        assert significant_strides(y) == significant_strides(expected), backend
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert significant_strides(dx) == significant_strides(torch.empty(shape).to(
            memory_format=torch.channels_last if is_last else torch.contiguous_format)), backend  # fmt: skip
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in (x, weight, None, None, out_mask)]
        y = gk.gated_conv2d(*fakes, padding=1)
    assert y.shape == expected.shape
    assert significant_strides(y) == significant_strides(expected)
