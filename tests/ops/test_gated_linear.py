"""The operation ``gated_linear``: its reference against the definition, its kernels against the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

import gatedkernels as gk
from gatedkernels import _extension

# N, token dimensions, C, K
SHAPES = [
    (2, (197,), 64, 256),
    (3, (13,), 130, 70),
    (2, (5, 7), 33, 65),
    (1, (300,), 20, 5),
    (4, (7,), 17, 31),
    (3, (6,), 48, 200),
    (2, (25,), 48, 200),
    (5, (), 70, 33),
    (1, (), 1, 1),
    (1, (9,), 1, 1),
]
# Densities of in_mask and out_mask; None: no mask
MASKS = [(None, None), (0.5, None), (None, 0.5), (0.3, 0.4), (0.1, None), (0.0, 0.5), (0.5, 0.0), (1.0, 1.0)]

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", "dense", pytest.param("cpu", marks=needs_cpu)]
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")


def make_mask(lead: int | Sequence[int], channels: int, density: float | None) -> Tensor | None:
    lead = (lead,) if isinstance(lead, int) else lead
    return None if density is None else torch.rand(*lead, channels) < density


def make_weights(k: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(k, c).to(dtype), torch.randn(k).to(dtype)


def make_samples(shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    if layout == "expanded":  # one sample for all
        return x[:1].expand(*shape)
    if layout == "sliced":  # every other channel, NaN between them
        wide = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)
        return wide[..., ::2].copy_(x)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


def where(mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return x
    return torch.where(mask if mask.ndim == x.ndim else mask[(slice(None), *[None] * (x.ndim - 2))], x, 0)


def definition(in_mask: Tensor | None, out_mask: Tensor | None) -> Callable[..., Tensor]:
    """The masked layer as anybody would write it, with the gradients that autograd finds."""
    return lambda x, w, b: where(out_mask, linear(where(in_mask, x), w, b))


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("by_token", [False, True])
def test_reference_matches_definition(masks: tuple[float | None, float | None], by_token: bool):
    x, (weight, bias) = torch.randn(3, 2, 5).double(), make_weights(4, 5, torch.float64)
    lead = (3, 2) if by_token else (3,)
    in_mask, out_mask = make_mask(lead, 5, masks[0]), make_mask(lead, 4, masks[1])
    y = gk.gated_linear(x, weight, bias, in_mask, out_mask, backend="reference")
    expected = torch.zeros_like(y)
    for n in range(3):
        for t in range(2):
            at = (n, t) if by_token else (n,)
            for k in range(4):
                if out_mask is None or out_mask[at][k]:
                    read = range(5) if in_mask is None else in_mask[at].nonzero()[:, 0].tolist()
                    expected[n, t, k] = bias[k] + sum(weight[k, c] * x[n, t, c] for c in read)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("masks", [(None, None), (0.5, None), (None, 0.5), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("tokens", [(), (3,), (2, 2)], ids=str)
def test_reference_gradients(masks: tuple[float | None, float | None], tokens: tuple[int, ...]):
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(2, *tokens, 4), (6, 4), (6,)]
    )
    in_mask, out_mask = make_mask(2, 4, masks[0]), make_mask((2, *tokens), 6, masks[1])
    assert torch.autograd.gradcheck(
        lambda *tensors: gk.gated_linear(*tensors, in_mask, out_mask, backend="reference"), (x, weight, bias)
    )


@needs_cpu
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_token", [(False, False), (True, True), (True, False)], ids=str)
def test_kernel(shape: tuple[Any, ...], masks: tuple[float | None, float | None], by_token: tuple[bool, bool], compare):
    n, tokens, c, k = shape
    weight, bias = make_weights(k, c)
    lead_in, lead_out = ((n, *tokens) if each else (n,) for each in by_token)
    in_mask, out_mask = make_mask(lead_in, c, masks[0]), make_mask(lead_out, k, masks[1])
    compare(
        lambda x, w, b: gk.gated_linear(x, w, b, in_mask, out_mask, backend="cpu"),
        definition(in_mask, out_mask),
        [make_samples((n, *tokens, c)), weight, bias],
        rounding=8,
    )


@needs_cpu
@pytest.mark.parametrize("shape", [(1, 16, 2048, 40), (1, 16, 40, 2048)], ids=["in", "out"])
@pytest.mark.parametrize("masks", [(1.0, None), (None, 1.0)], ids=str)
def test_kernel_sums_many_channels(shape: tuple[int, ...], masks: tuple[float | None, float | None], compare):
    n, tokens, c, k = shape
    test_kernel((n, (tokens,), c, k), masks, (False, False), compare)


@needs_cpu
@pytest.mark.parametrize("tokens", [1, 24, 25, 40])
@pytest.mark.parametrize("unit", [0, 31, 32, 99])
def test_one_open_unit(unit: int, tokens: int):
    x, (weight, bias) = torch.randn(2, tokens, 50), make_weights(100, 50)
    one = torch.zeros(2, 100, dtype=torch.bool)
    one[0, unit] = True
    y = gk.gated_linear(x, weight, bias, None, one, backend="cpu")
    torch.testing.assert_close(y[0, :, unit], x[0] @ weight[unit] + bias[unit], rtol=1e-4, atol=1e-4)
    y[0, :, unit] = 0
    assert not y.any()
    z = gk.gated_linear(y, weight.T.contiguous(), None, one, None, backend="cpu")
    assert torch.equal(z, torch.zeros(2, tokens, 50))


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_kernel_serves_any_size(data: st.DataObject, compare):
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("N", 5), ("C", 200), ("K", 200)))
    tokens = data.draw(st.sampled_from([(), (1,), (2, 3), (24,), (25,), (36,), (4, 25), (270,)]), "tokens")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    densities = st.sampled_from([None, 0.0, 0.02, 0.1, 0.5, 1.0])
    in_density, out_density = data.draw(densities, "in"), data.draw(densities, "out")
    by_token = data.draw(st.booleans(), "by token")
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias = make_weights(k, c)
    weight = data.draw(st.sampled_from([weight, weight.T.contiguous().T]), "weight")
    lead = (n, *tokens) if by_token else (n,)
    in_mask, out_mask = make_mask(lead, c, in_density), make_mask(lead, k, out_density)
    dense_input_grad = in_density is None and data.draw(st.booleans(), "dense_input_grad")

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = {"dense_input_grad": dense_input_grad, "backend": "cpu"}
        return gk.gated_linear(x, weight, bias, in_mask, out_mask, **rest)

    x = make_samples((n, *tokens, c), layout)
    compare(run, definition(in_mask, out_mask), [x, weight, bias], rounding=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_serves_every_dtype_and_layout(shape: tuple[Any, ...], dtype: torch.dtype, layout: str, compare):
    n, tokens, c, k = shape
    in_mask, out_mask = make_mask(n, c, 0.5), make_mask(n, k, 0.6)
    compare(
        lambda x, w, b: gk.gated_linear(x, w, b, in_mask, out_mask),
        definition(in_mask, out_mask),
        [make_samples((n, *tokens, c), layout, dtype), *make_weights(k, c, dtype)],
        rounding=8,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("group", [2, 8])
def test_group_is_one_decision_for_neighbours(backend: str, group: int, by_token: bool):
    x, (weight, bias) = torch.randn(3, 9, 16), make_weights(24, 16)
    lead = (3, 9) if by_token else (3,)
    in_mask, out_mask = make_mask(lead, 16 // group, 0.5), make_mask(lead, 24 // group, 0.5)
    y = gk.gated_linear(x, weight, bias, in_mask, out_mask, group=group, backend=backend)
    every = [mask.repeat_interleave(group, -1) for mask in (in_mask, out_mask)]
    assert torch.equal(y, gk.gated_linear(x, weight, bias, *every, backend=backend))
    torch.testing.assert_close(y, definition(*every)(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", MASKS[:4], ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0), (0,)], ids=str)
def test_nothing_to_compute(backend: str, shape: tuple[int, ...], masks: tuple[float | None, float | None], gradients):
    in_mask, out_mask = make_mask(shape[0], 4, masks[0]), make_mask(shape[0], 6, masks[1])
    weight, bias = make_weights(6, 4)
    y, dx, dweight, dbias = gradients(
        lambda x, w, b: gk.gated_linear(x, w, b, in_mask, out_mask, backend=backend),
        [torch.randn(*shape, 4), weight, bias],
    )
    assert y.shape == (*shape, 6)
    assert dx.shape == (*shape, 4)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 30])
def test_all_closed(backend: str, tokens: int, gradients):
    closed = torch.zeros(2, 8, dtype=torch.bool)
    x, (weight, bias) = torch.randn(2, tokens, 8), make_weights(8, 8)
    for masks in ((None, closed), (closed, closed)):
        results = gradients(
            lambda x, w, b, masks=masks: gk.gated_linear(x, w, b, *masks, backend=backend), [x, weight, bias]
        )
        assert all(torch.equal(result, torch.zeros_like(result)) for result in results)
    y = gk.gated_linear(x, weight, bias, closed, backend=backend)
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [(), (4,), (31,)], ids=str)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("out_density", [None, 0.5])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_closed_inputs_are_never_read(
    backend: str, tokens: tuple[int, ...], by_token: bool, out_density: float | None, poison: float, gradients
):
    lead = (3, *tokens) if by_token else (3,)
    in_mask, out_mask = make_mask(lead, 70, 0.5), make_mask(lead, 40, out_density)
    weight, bias = make_weights(40, 70)
    clean = torch.randn(3, *tokens, 70)
    open_ = where(in_mask, torch.ones_like(clean)).bool()
    results = [
        gradients(lambda x, w, b: gk.gated_linear(x, w, b, in_mask, out_mask, backend=backend), [x, weight, bias])
        for x in (clean, torch.where(open_, clean, poison))
    ]
    for name, expected, actual in zip(("y", "dx", "dweight", "dbias"), *results, strict=True):
        assert actual.isfinite().all(), name
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not results[1][1][~open_].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 30])
def test_gradients_of_closed_outputs_are_never_read(backend: str, tokens: int):
    out_mask = make_mask(3, 40, 0.5)
    tensors = [t.requires_grad_() for t in (torch.randn(3, tokens, 9), *make_weights(40, 9))]
    y = gk.gated_linear(*tensors, None, out_mask, backend=backend)
    dy = torch.randn_like(y)
    clean = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    poisoned = torch.autograd.grad(y, tensors, torch.where(out_mask[:, None], dy, torch.nan))
    for expected, actual in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("masks", [(None, 0.6), (0.6, None), (0.6, 0.6)], ids=str)
def test_nan_in_open_channels_shows(backend: str, tokens: int, masks: tuple[float | None, float | None]):
    in_mask, out_mask = make_mask(2, 8, masks[0]), make_mask(2, 80, masks[1])
    if in_mask is not None:
        in_mask[0, 3] = True
    x, (weight, bias) = torch.randn(2, tokens, 8), make_weights(80, 8)
    x[0, 2, 3] = torch.nan
    y = gk.gated_linear(x, weight, bias, in_mask, out_mask, backend=backend)
    assert torch.equal(y.isnan(), definition(in_mask, out_mask)(x, weight, bias).isnan())
    assert y.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_units_and_unused_weights(backend: str, gradients):
    out_mask = make_mask(4, 48, 0.5)
    out_mask[:, [3, 17]] = False
    x, (weight, bias) = torch.randn(4, 26, 9), make_weights(48, 9)
    order = torch.randperm(48)

    def run(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor = out_mask) -> Tensor:
        return gk.gated_linear(x, weight, bias, None, mask, backend=backend)

    permuted = run(x, weight[order], bias[order], out_mask[:, order])
    torch.testing.assert_close(permuted, run(x, weight, bias)[..., order], rtol=1e-4, atol=1e-4)
    _, _, dweight, dbias = gradients(run, [x, weight, bias])
    assert not dweight[[3, 17]].any()
    assert not dbias[[3, 17]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str):
    x, (weight, bias) = torch.randn(2, 4, 5).requires_grad_(), make_weights(6, 5)
    y = gk.gated_linear(x, weight.requires_grad_(), bias, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        dx.sum().backward()


# -- gradients of gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_density", [None, 0.5])
@pytest.mark.parametrize("by_token", [False, True])
def test_gate_gradients_are_those_of_the_masked_dense_network(out_density: float | None, by_token: bool):
    x, (weight, bias) = torch.randn(3, 5, 6).double(), make_weights(8, 6, torch.float64)
    hard, out_mask = make_mask((3, 5, 6)[: 1 + by_token], 6, 0.5), make_mask(3, 8, out_density)

    def gate_gradient(apply: Callable[[Tensor], Tensor]) -> Tensor:
        gate = hard.double().requires_grad_()
        y = apply(x * (gate if by_token else gate[:, None]))
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
        return gate.grad

    expected = gate_gradient(lambda x: where(out_mask, linear(x, weight, bias)))
    run = {dense: lambda x, d=dense: gk.gated_linear(x, weight, bias, hard, out_mask, dense_input_grad=d)
           for dense in (True, False)}  # fmt: skip
    torch.testing.assert_close(gate_gradient(run[True]), expected)
    # Without it the closed gates hear nothing: the option is needed, and this test can fail.
    torch.testing.assert_close(gate_gradient(run[False]), torch.where(hard, expected, 0))
    assert expected[~hard].any()


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
@pytest.mark.parametrize("out_density", [None, 0.5])
def test_dense_input_gradient_of_the_kernel(
    shape: tuple[Any, ...], out_density: float | None, gradients, assert_within_budget
):
    n, tokens, c, k = shape
    in_mask, out_mask = make_mask(n, c, 0.5), make_mask(n, k, out_density)
    tensors = [where(in_mask, make_samples((n, *tokens, c))), *make_weights(k, c)]
    run = {"dense_input_grad": True, "backend": "cpu"}
    actual = gradients(lambda x, w, b: gk.gated_linear(x, w, b, in_mask, out_mask, **run), tensors)
    unmasked = definition(None, out_mask)
    exact = gradients(unmasked, [t.double() for t in tensors], torch.float32)
    for a, e, own in zip(actual, exact, gradients(unmasked, tensors), strict=True):
        assert_within_budget(a, e, own, rounding=8)


# -- dtypes and layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, gradients):
    in_mask, out_mask = make_mask(2, 8, 0.5), make_mask(2, 12, 0.5)
    tensors = [torch.randn(2, 6, 8), *make_weights(12, 8)]
    with torch.autocast("cpu", dtype=dtype):
        actual = gradients(lambda *t: gk.gated_linear(*t, in_mask, out_mask), tensors)
        expected = gradients(definition(in_mask, out_mask), tensors)
    assert actual[0].dtype == dtype
    assert [gradient.dtype for gradient in actual[1:]] == [torch.float32] * 3
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [None, 0.0, 0.5, 1.0])
def test_results_are_contiguous(layout: str, density: float | None):
    x, (weight, _) = make_samples((3, 7, 9), layout), make_weights(11, 9)
    mask = make_mask(3, 11, density)
    for backend in ("reference", "dense", "auto", *(["cpu"] if _extension.CPU_ERROR is None else [])):
        leaf = x.detach().requires_grad_()
        y = gk.gated_linear(leaf, weight, None, None, mask, backend=backend)
        assert y.is_contiguous()
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert dx.is_contiguous()
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in (x, weight, None, None, mask)]
        y = gk.gated_linear(*fakes)
    assert y.shape == (3, 7, 11)
    assert y.is_contiguous()
