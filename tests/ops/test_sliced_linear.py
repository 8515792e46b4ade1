"""The operation ``sliced_linear``: it equals the layer of the sliced weights, for one width and for many."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import linear

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.gated_linear.reference import gated_linear_reference
from gatedkernels.ops.sliced_conv2d.reference import prefix
from gatedkernels.ops.sliced_linear import op

# N, token dimensions, C, K
SHAPES = [
    (2, (197,), 64, 256),
    (3, (13,), 130, 70),
    (2, (5, 7), 33, 65),
    (1, (300,), 20, 5),
    (4, (7,), 17, 31),
    (5, (), 70, 33),
    (1, (), 1, 1),
]

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", "dense", pytest.param("cpu", marks=needs_cpu)]
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")


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


def widths(n: int, channels: int) -> Tensor:
    return torch.randint(0, channels + 1, (n,))


def keep(width: Any, x: Tensor) -> Tensor:
    """Zeros behind the first ``width[n]`` channels of every sample."""
    if width is None:
        return x
    mask = torch.arange(x.shape[-1]) < torch.as_tensor(width)[:, None]
    return torch.where(mask[(slice(None), *[None] * (x.ndim - 2))], x, 0)


def definition(in_width: Any, out_width: Any) -> Callable[..., Tensor]:
    """What a width for every sample means, with the gradients that autograd finds."""
    return lambda x, w, b: keep(out_width, linear(keep(in_width, x), w, b))


# -- one width for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sliced_layer(backend: str, shape: Sequence[Any], layout: str, compare):
    n, tokens, c, k = shape
    ins, outs = (c + 1) // 2, (2 * k + 2) // 3
    weight, bias = make_weights(k, c)
    compare(
        lambda x, w, b: gk.sliced_linear(x, w, b, ins, outs, backend=backend),
        lambda x, w, b: linear(x[..., :ins], w[:outs, :ins], b[:outs]),
        [make_samples((n, *tokens, c), layout), weight, bias],
        rounding=2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [7, torch.tensor([10, 3, 7])], ids=["int", "tensor"])
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_dtypes(dtype: torch.dtype, width: Any, backend: str, compare):
    weight, bias = make_weights(12, 10, dtype)
    every = width if isinstance(width, Tensor) else [width] * 3
    compare(
        lambda x, w, b: gk.sliced_linear(x, w, b, width, backend=backend),
        definition(every, None),
        [make_samples((3, 6, 10), dtype=dtype), weight, bias],
        rounding=3,
    )


def test_an_input_that_is_narrow_already():
    x, (weight, bias) = torch.randn(2, 5), make_weights(8, 9)
    torch.testing.assert_close(gk.sliced_linear(x, weight, bias, out_width=3), linear(x, weight[:3, :5], bias[:3]))


# -- a width for every sample ------------------------------------------------------------------------------------------


def test_the_definition_is_a_gated_layer():
    x, (weight, bias) = torch.randn(4, 3, 5).double(), make_weights(6, 5, torch.float64)
    ins, outs = torch.tensor([0, 3, 5, 9]), torch.tensor([6, 2, 0, -1])
    y = gk.sliced_linear(x, weight, bias, ins, outs, backend="reference")
    torch.testing.assert_close(y, gated_linear_reference(x, weight, bias, prefix(ins, 5), prefix(outs, 6)))
    for n, (i, o) in enumerate([(0, 6), (3, 2), (5, 0), (5, 0)]):
        torch.testing.assert_close(y[n, :, :o], linear(x[n, :, :i], weight[:o, :i], bias[:o]))
        assert not y[n, :, o:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "in", "out"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sample_has_its_width(backend: str, shape: Sequence[Any], which: tuple[bool, bool], layout: str, compare):
    n, tokens, c, k = shape
    ins, outs = (widths(n, channels) if has else None for has, channels in zip(which, (c, k), strict=True))
    weight, bias = make_weights(k, c)
    compare(
        lambda x, w, b: gk.sliced_linear(x, w, b, ins, outs, backend=backend),
        definition(ins, outs),
        [make_samples((n, *tokens, c), layout), weight, bias],
        rounding=3,
    )


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_the_kernel_serves_any_size(data: st.DataObject, compare):
    n, t, c, k = (data.draw(st.integers(1, m), name) for name, m in (("N", 5), ("T", 60), ("C", 600), ("K", 200)))
    ins = torch.tensor(data.draw(st.lists(st.integers(0, c), min_size=n, max_size=n), "in"))
    outs = torch.tensor(data.draw(st.lists(st.integers(0, k), min_size=n, max_size=n), "out"), dtype=torch.int32)
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias = make_weights(k, c)
    compare(
        lambda x, w, b: gk.sliced_linear(x, w, b, ins, outs, backend="cpu"),
        definition(ins, outs),
        [make_samples((n, t, c)), weight, bias],
        rounding=4,  # of a few elements, whose errors do not average
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_the_width_is_neither_read_nor_left(backend: str):
    ins, outs = torch.tensor([2, 5, 0]), torch.tensor([3, 1, 40])
    x, (weight, bias) = torch.randn(3, 5, 6), make_weights(40, 6)
    clean = gk.sliced_linear(x, weight, bias, ins, outs, backend=backend)
    for n in range(3):
        x[n, :, ins[n] :] = torch.nan
        assert not clean[n, :, outs[n] :].any()
    assert torch.equal(gk.sliced_linear(x, weight, bias, ins, outs, backend=backend), clean)


@needs_cpu
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_width_is_a_plan_without_a_list(tokens: int):
    """One mechanism: the gated layer of masks that are prefixes has lists, and the same bits."""
    x, (weight, bias), ins = torch.randn(4, tokens, 300), make_weights(130, 300), torch.tensor([300, 7, 0, 258])
    sliced = gk.sliced_linear(x, weight, bias, ins, backend="cpu")
    assert torch.equal(sliced, gk.gated_linear(x, weight, bias, prefix(ins, 300), backend="cpu"))


@needs_cpu
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [3, 200], ids=["panel by panel", "sample by sample"])
def test_widths_at_the_ends_of_panels(tokens: int, threads: int, compare):
    before = torch.get_num_threads()
    ins, outs = torch.tensor([300, 1, 256, 0, 299, 257]), torch.tensor([0, 32, 33, 256, 288, 255])
    torch.set_num_threads(threads)
    try:
        compare(
            lambda x, w, b: gk.sliced_linear(x, w, b, ins, outs, backend="cpu"),
            definition(ins, outs),
            [make_samples((6, tokens, 300)), *make_weights(288, 300)],
            rounding=4,
        )
    finally:
        torch.set_num_threads(before)


@needs_cpu
def test_a_known_call_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    def forbid(*_: object) -> None:
        raise AssertionError("the call was looked at")

    x, weight, ins = torch.randn(2, 3, 8), torch.randn(9, 8), torch.tensor([8, 4])
    expected = gk.sliced_linear(x, weight, None, ins, ins)
    monkeypatch.setattr(op.arguments, "check_tokens", forbid)
    assert torch.equal(gk.sliced_linear(x, weight, None, ins, ins), expected)
    assert torch.equal(gk.sliced_linear(x.roll(1, 0), weight, None, ins.roll(1), ins.roll(1)), expected.roll(1, 0))
    for other in ((x, weight, None, ins, None), (x, weight, None, ins, ins.int()), (x, weight, None, ins, 4)):
        with pytest.raises(AssertionError, match="looked at"):
            gk.sliced_linear(*other)
    with pytest.raises(AssertionError, match="looked at"):
        gk.sliced_linear(x, weight.clone().requires_grad_(), None, ins, ins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend: str):
    nothing = torch.zeros(0, dtype=torch.int64)
    x, weight = torch.zeros(0, 3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    y = gk.sliced_linear(x, weight, None, nothing, nothing, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 3, 6) and weight.grad is not None and not weight.grad.any()


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", ["both", "in", "no tokens", "empty batch"])
def test_registration(backend: str, grad: bool, case: str):
    n = 0 if case == "empty batch" else 3
    x = torch.randn((n, 5) if case == "no tokens" else (n, 4, 5)).requires_grad_(grad)
    weight, bias = (t.requires_grad_(grad) for t in make_weights(7, 5))
    ins, outs = widths(n, 5).int(), None if case == "in" else widths(n, 7).int()
    torch.library.opcheck(torch.ops.gatedkernels.sliced_linear.default, (x, weight, bias, ins, outs, backend))


def test_a_graph_for_all_widths(gradients):
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = make_weights(16, 12)

    def run(x: Tensor, weight: Tensor, bias: Tensor, ins: int, outs: int) -> Tensor:
        return gk.sliced_linear(x, weight, bias, ins, outs).relu()

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for ins, outs in ((12, 16), (9, 11), (5, 7), (3, 14), (7, 3)):
        x = torch.randn(2, 5, 12)
        expected = gradients(lambda *t, i=ins, o=outs: run(*t, i, o), [x, weight, bias])
        actual = gradients(lambda *t, i=ins, o=outs: compiled(*t, i, o), [x, weight, bias])
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)
    assert counter.frame_count <= 3  # the first widths, other ones, and the full one again


def test_compiled_with_a_width_for_every_sample():
    torch._dynamo.reset()
    weight, bias = make_weights(8, 6)
    compiled = torch.compile(gk.sliced_linear, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        arguments = torch.randn(n, 5, 6), weight, bias, widths(n, 6), widths(n, 8)
        torch.testing.assert_close(compiled(*arguments), gk.sliced_linear(*arguments))


def test_autocast():
    x, (weight, bias) = torch.randn(2, 4), make_weights(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert gk.sliced_linear(x, weight, bias, 2, 3).dtype == torch.bfloat16
        assert gk.sliced_linear(x, weight, bias, torch.tensor([2, 3])).dtype == torch.bfloat16


def forbid(*_: object) -> Tensor:
    raise AssertionError("the wrong implementation was called")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explicit_backend_is_the_one(backend: str, monkeypatch: pytest.MonkeyPatch):
    for other in op.LAUNCHERS.keys() - {backend}:
        monkeypatch.setitem(op.LAUNCHERS, other, forbid)
    weight, bias = make_weights(8, 8)
    gk.sliced_linear(torch.randn(2, 8), weight, bias, torch.tensor([3, 8]), backend=backend)


# -- errors ------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(6, 4), torch.zeros(6)
WIDTH = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must have 1 to 4 channels.*, got \(2, 5\)"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(K, C\), got \(4,\)"),
        ({"weight": WEIGHT.double()}, TypeError, r"weight must have the dtype of x, .*float32, got torch\.float64"),
        ({"bias": BIAS[:5]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"in_width": 0}, ValueError, "in_width must lie between 1 and 4, got 0"),
        ({"out_width": 7}, ValueError, "out_width must lie between 1 and 6, got 7"),
        ({"out_width": 0.5}, TypeError, r"out_width must be an int, a tensor of ints or None, got 0\.5"),
        ({"out_width": WIDTH.float()}, TypeError, r"out_width must have dtype torch\.int32 or torch\.int64, got .*32"),
        ({"in_width": WIDTH[:1]}, ValueError, r"in_width must have shape \(2,\), one for every sample, got \(1,\)"),
        ({"in_width": WIDTH.to("meta")}, ValueError, "in_width must be on the device of x, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, .* for this operation, got 'cuda'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(error, match=message):
        gk.sliced_linear(**arguments)
