"""Sliced operations on Triton against their definition: on a GPU, or interpreted on the CPU (see test_triton.py)."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

import gatedkernels as gk

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
    (4, 17, 19, 7, 6, 3, 3, 2, 1, 1),
    (2, 40, 70, 3, 3, 1, 1, 1, 0, 1),
    (2, 33, 5, 5, 8, 1, 1, 2, 0, 1),
    (2, 6, 9, 7, 8, 2, 3, (2, 3), (2, 0), (1, 2)),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw(samples: int, channels: int) -> Tensor:
    """Any widths, none and all among them."""
    widths = torch.randint(0, channels + 1, (samples,), device=DEVICE)
    widths[0], widths[-1] = 0, channels + 3  # more than there are means all
    return widths


def there(width: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """Bool, like ``x``: the first ``width[n]`` channels of every sample."""
    if width is None:
        return torch.ones_like(x, dtype=torch.bool)
    channels = torch.arange(x.shape[dim], device=x.device) < width[:, None]
    shape = [len(x)] + [1] * (x.ndim - 1)
    shape[dim] = x.shape[dim]
    return channels.view(shape).expand_as(x)


def check_conv(compare: Callable[..., None], case: Sequence[Any], ins: bool, outs: bool, dtype: torch.dtype) -> None:
    n, c, k, h, w, r, s, stride, padding, dilation = case
    in_width, out_width = draw(n, c) if ins else None, draw(n, k) if outs else None
    options = {"stride": stride, "padding": padding, "dilation": dilation}

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = conv2d(torch.where(there(in_width, x, 1), x, 0), weight, bias, **options)
        return torch.where(there(out_width, y, 1), y, 0)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gk.sliced_conv2d(x, weight, bias, in_width, out_width, **options, backend="triton")

    x = randn(n, c, h, w, dtype=dtype)
    x = torch.where(there(in_width, x, 1), x, torch.nan)
    compare(run, definition, [x, randn(k, c, r, s, dtype=dtype), randn(k, dtype=dtype)], rounding=2)


@pytest.mark.parametrize(("ins", "outs"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_a_width_for_every_sample(compare, case: Sequence[Any], ins: bool, outs: bool):
    check_conv(compare, case, ins, outs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes(compare, dtype: torch.dtype):
    check_conv(compare, GEOMETRIES[0], True, True, dtype)


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_one_width_for_all(compare, case: Sequence[Any]):
    n, c, k, h, w, r, s, stride, padding, dilation = case
    ins, outs = (c + 1) // 2, (2 * k + 2) // 3
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    compare(
        lambda x, weight, bias: gk.sliced_conv2d(x, weight, bias, ins, outs, **options, backend="triton"),
        lambda x, weight, bias: conv2d(x[:, :ins], weight[:outs, :ins], bias[:outs], **options),
        [randn(n, c, h, w), randn(k, c, r, s), randn(k)],
        rounding=2,
    )


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded"])
def test_layouts(images, layout: str):
    x, weight, width = images((3, 10, 4, 5), layout, device=DEVICE), randn(20, 10, 3, 3), draw(3, 20)
    y, exact = (gk.sliced_conv2d(x, weight, None, None, width, padding=1, backend=b) for b in ("triton", "reference"))
    assert y.stride() == exact.stride()
    torch.testing.assert_close(y, exact)


@pytest.mark.parametrize(("ins", "outs"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("tokens", [(), (7,), (2, 5)], ids=str)
def test_linear_layers(compare, tokens: tuple[int, ...], ins: bool, outs: bool):
    x = randn(3, *tokens, 20)
    in_width, out_width = draw(3, 20) if ins else None, draw(3, 37) if outs else None

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = linear(torch.where(there(in_width, x, x.ndim - 1), x, 0), weight, bias)
        return torch.where(there(out_width, y, y.ndim - 1), y, 0)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gk.sliced_linear(x, weight, bias, in_width, out_width, backend="triton")

    tensors = [x, randn(37, 20), randn(37)]
    actual, exact = run(*tensors), definition(*tensors)
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)
    for own, theirs in zip(_gradients(run, tensors), _gradients(definition, tensors), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def _gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    return torch.autograd.grad(y, leaves, dy)


def test_one_width_of_a_linear_layer():
    x, weight, bias = randn(2, 5, 20), randn(37, 20), randn(37)
    y = gk.sliced_linear(x, weight, bias, 11, 9, backend="triton")
    torch.testing.assert_close(y, linear(x[..., :11], weight[:9, :11], bias[:9]), rtol=1e-5, atol=1e-5)


def test_an_empty_batch():
    x, width = randn(0, 8, 4, 4).requires_grad_(), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    weight = randn(6, 8, 3, 3).requires_grad_()
    y = gk.sliced_conv2d(x, weight, None, None, width, padding=1, backend="triton")
    assert y.shape == (0, 6, 4, 4)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_width_is_a_mask_that_is_a_prefix():
    """One mechanism: the gated convolution of such a mask, with a list, and this one without give the same bits."""
    x, weight, bias, width = randn(3, 20, 5, 6), randn(37, 20, 3, 3), randn(37), draw(3, 37)
    mask = torch.arange(37, device=DEVICE) < width[:, None]
    gated = gk.gated_conv2d(x, weight, bias, None, mask, padding=1, backend="triton")
    sliced = gk.sliced_conv2d(x, weight, bias, None, width, padding=1, backend="triton")
    assert torch.equal(gated, sliced)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="backend 'triton' serves groups 1, got 2"):
        gk.sliced_conv2d(
            randn(2, 8, 4, 4), randn(8, 4, 3, 3), None, torch.tensor([8, 4], device=DEVICE), groups=2, backend="triton"
        )
