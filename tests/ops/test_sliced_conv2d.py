"""The operation ``sliced_conv2d``: it equals the convolution of the sliced weights, for one width and for many."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels import _extension, policy
from gatedkernels.ops._widths import equal_widths, put, take
from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_reference
from gatedkernels.ops.sliced_conv2d import op
from gatedkernels.ops.sliced_conv2d.reference import prefix

GEOMETRY = ((1, 1), (1, 1), (1, 1))
# N, C, K, H, W, side of the window, stride: what the CPU kernels serve
SHAPES = [
    (4, 64, 64, 8, 8, 3, 1),
    (2, 3, 40, 33, 31, 3, 1),
    (3, 70, 130, 7, 9, 3, 2),
    (3, 33, 65, 5, 6, 1, 1),
    (2, 17, 31, 6, 7, 1, 2),
    (5, 130, 20, 4, 4, 3, 1),
    (2, 5, 3, 1, 1, 1, 2),
    (1, 1, 1, 1, 1, 3, 1),
    (5, 40, 70, 33, 31, 3, 1),  # and the last two on tiles, where every sample has its width
    (16, 20, 33, 16, 16, 3, 1),
]
# Everybody else is served by PyTorch: C, K, size of the window, and the rest
GENERAL = {
    "7x7": (3, 8, (7, 7), {"stride": 2, "padding": 3}),
    "dilated": (6, 8, (3, 3), {"dilation": 2, "padding": 2}),
    "grouped": (8, 12, (3, 3), {"groups": 4, "padding": 1}),
    "depthwise": (8, 8, (3, 3), {"groups": 8, "padding": 1, "stride": 2}),
    "depthwise, two of each": (6, 12, (3, 3), {"groups": 6, "padding": 1}),
    "uneven": (4, 5, (2, 3), {"stride": (1, 3), "padding": (2, 0), "dilation": (3, 2)}),
}

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", "dense", pytest.param("cpu", marks=needs_cpu)]


def make_weights(k: int, c: int, *size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(k, c, *size).to(dtype), torch.randn(k).to(dtype)


def widths(n: int, channels: int, least: int = 0) -> Tensor:
    return torch.randint(least, channels + 1, (n,))


def keep(width: Any, x: Tensor) -> Tensor:
    """Zeros behind the first ``width[n]`` channels of every sample."""
    if width is None:
        return x
    return torch.where(
        torch.arange(x.shape[1])[None, :, None, None] < torch.as_tensor(width)[:, None, None, None], x, 0
    )


def definition(in_width: Any, out_width: Any, **options: Any) -> Callable[..., Tensor]:
    """What a width for every sample means, with the gradients that autograd finds."""
    return lambda x, w, b: keep(out_width, conv2d(keep(in_width, x), w, b, **options))


# -- one width for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sliced_convolution(backend: str, shape: Sequence[int], layout: str, images, compare):
    n, c, k, h, w, side, stride = shape
    ins, outs = (c + 1) // 2, (2 * k + 2) // 3
    options = {"stride": stride, "padding": side // 2}
    weight, bias = make_weights(k, c, side, side)
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, ins, outs, backend=backend, **options),
        lambda x, w, b: conv2d(x[:, :ins], w[:outs, :ins], b[:outs], **options),
        [images((n, c, h, w), layout), weight, bias],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, images, compare):
    weight, bias = make_weights(12, 10, 3, 3, dtype=dtype)
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, 7, 5, padding=1),
        lambda x, w, b: conv2d(x[:, :7], w[:5, :7], b[:5], padding=1),
        [images((2, 10, 6, 5), "contiguous", dtype), weight, bias],
        rounding=3,
    )


@pytest.mark.parametrize("case", GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_any_geometry(backend: str, case: str, images, compare):
    c, k, size, options = GENERAL[case]
    weight, bias = make_weights(k, c // options.get("groups", 1), *size)
    for ins, outs in ((c, k), (c // 2, k // 2), (c // 2 + 1, k // 2), (1, k), (c, 1)):

        def expected(x: Tensor, w: Tensor, b: Tensor, ins: int = ins, outs: int = outs) -> Tensor:
            every = torch.full((len(x),), ins)
            return definition(every, None, **options)(x, w, b)[:, :outs]

        def run(x: Tensor, w: Tensor, b: Tensor, ins: int = ins, outs: int = outs) -> Tensor:
            return gk.sliced_conv2d(x, w, b, ins, outs, backend=backend, **options)

        compare(run, expected, [images((2, c, 9, 11)), weight, bias], rounding=2)


def test_a_depthwise_slice_runs_as_few_groups(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def watch(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append((x.shape[1], weight.shape[0], rest[-1]))
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(op, "conv2d", watch)
    gk.sliced_conv2d(torch.randn(2, 32, 4, 4), torch.randn(32, 1, 3, 3), None, 8, 8, groups=32, padding=1)
    assert seen == [(8, 8, 8)]


def test_an_input_that_is_narrow_already():
    x, (weight, bias) = torch.randn(2, 5, 6, 6), make_weights(8, 9, 3, 3)
    y = gk.sliced_conv2d(x, weight, bias, out_width=3, padding=1)
    torch.testing.assert_close(y, conv2d(x, weight[:3, :5], bias[:3], padding=1))
    y = gk.sliced_conv2d(x, weight, bias, torch.tensor([5, 2]), padding=1)
    torch.testing.assert_close(y, definition([5, 2], None, padding=1)(x, weight[:, :5], bias), rtol=1e-4, atol=1e-4)


# -- a width for every sample ------------------------------------------------------------------------------------------


def test_the_definition_is_a_gated_convolution():
    x, (weight, bias) = torch.randn(4, 5, 6, 7).double(), make_weights(6, 5, 3, 3, dtype=torch.float64)
    ins, outs = torch.tensor([0, 3, 5, 9]), torch.tensor([6, 2, 0, -1])
    y = gk.sliced_conv2d(x, weight, bias, ins, outs, padding=1, backend="reference")
    masks = prefix(ins, 5), prefix(outs, 6)
    assert masks[0] is not None and masks[0].sum(1).tolist() == [0, 3, 5, 5]
    torch.testing.assert_close(y, gated_conv2d_reference(x, weight, bias, *masks, *GEOMETRY, 1))
    for n, (i, o) in enumerate([(0, 6), (3, 2), (5, 0), (5, 0)]):
        if i and o:
            torch.testing.assert_close(y[n : n + 1, :o], conv2d(x[n : n + 1, :i], weight[:o, :i], bias[:o], padding=1))
        elif o:
            torch.testing.assert_close(y[n, :o], bias[:o, None, None].expand(o, 6, 7))
        assert not y[n, o:].any()


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "in", "out"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sample_has_its_width(
    backend: str, shape: Sequence[int], which: tuple[bool, bool], layout: str, images, compare
):
    n, c, k, h, w, side, stride = shape
    ins, outs = (widths(n, channels) if has else None for has, channels in zip(which, (c, k), strict=True))
    options = {"stride": stride, "padding": side // 2}
    weight, bias = make_weights(k, c, side, side)
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, ins, outs, backend=backend, **options),
        definition(ins, outs, **options),
        [images((n, c, h, w), layout), weight, bias],
        rounding=2,
    )


@pytest.mark.parametrize("case", GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_every_sample_has_its_width_in_any_geometry(backend: str, case: str, images, compare):
    c, k, size, options = GENERAL[case]
    weight, bias = make_weights(k, c // options.get("groups", 1), *size)
    ins, outs = widths(5, c), widths(5, k)
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, ins, outs, backend=backend, **options),
        definition(ins, outs, **options),
        [images((5, c, 9, 11)), weight, bias],
        rounding=2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_every_sample_has_its_width_in_any_dtype(backend: str, dtype: torch.dtype, images, compare):
    weight, bias = make_weights(12, 10, 3, 3, dtype=dtype)
    ins, outs = torch.tensor([10, 3, 7, 3]), torch.tensor([4, 12, 1, 12])
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, ins, outs, padding=1, backend=backend),
        definition(ins, outs, padding=1),
        [images((4, 10, 6, 5), "contiguous", dtype), weight, bias],
        rounding=3,
    )


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_the_kernel_serves_any_size(data: st.DataObject, images, compare):
    n, c, k = (data.draw(st.integers(1, most), name) for name, most in (("N", 5), ("C", 70), ("K", 100)))
    h, w = data.draw(st.integers(1, 20), "H"), data.draw(st.integers(1, 20), "W")
    side, stride = data.draw(st.sampled_from([1, 3]), "window"), data.draw(st.sampled_from([1, 2]), "stride")
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"]), "layout")
    ins = torch.tensor(data.draw(st.lists(st.integers(0, c), min_size=n, max_size=n), "in"))
    outs = torch.tensor(data.draw(st.lists(st.integers(0, k), min_size=n, max_size=n), "out"), dtype=torch.int32)
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    weight, bias = make_weights(k, c, side, side)
    options = {"stride": stride, "padding": side // 2}
    compare(
        lambda x, w, b: gk.sliced_conv2d(x, w, b, ins, outs, backend="cpu", **options),
        definition(ins, outs, **options),
        [images((n, c, h, w), layout), weight, bias],
        rounding=4,  # of a few elements, whose errors do not average
    )


@pytest.mark.parametrize("side", [5, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_the_width_is_neither_read_nor_left(backend: str, side: int):
    ins, outs = torch.tensor([2, 45, 0]), torch.tensor([3, 1, 40])
    x, (weight, bias) = torch.randn(3, 50, side, side), make_weights(40, 50, 3, 3)
    clean = gk.sliced_conv2d(x, weight, bias, ins, outs, padding=1, backend=backend)
    for n in range(3):
        x[n, ins[n] :] = torch.nan
        assert not clean[n, outs[n] :].any()
    assert torch.equal(gk.sliced_conv2d(x, weight, bias, ins, outs, padding=1, backend=backend), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend: str):
    nothing = torch.zeros(0, dtype=torch.int64)
    x, weight = torch.zeros(0, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    y = gk.sliced_conv2d(x, weight, None, nothing, nothing, padding=1, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 6, 5, 5) and weight.grad is not None and not weight.grad.any()


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", ["both", "in", "channels last", "empty batch"])
def test_registration(backend: str, grad: bool, case: str, images):
    n = 0 if case == "empty batch" else 3
    x = images((n, 5, 4, 6), "channels_last" if case == "channels last" else "contiguous").requires_grad_(grad)
    weight, bias = (t.requires_grad_(grad) for t in make_weights(7, 5, 3, 3))
    ins, outs = widths(n, 5).int(), None if case == "in" else widths(n, 7).int()
    arguments = (x, weight, bias, ins, outs, *GEOMETRY, 1, backend)
    torch.library.opcheck(torch.ops.gatedkernels.sliced_conv2d.default, arguments)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_a_graph_for_all_widths(form: str, images, gradients):
    torch._dynamo.reset()
    counter = CompileCounter()
    weight, bias = make_weights(16, 12, 3, 3)

    def run(x: Tensor, weight: Tensor, bias: Tensor, ins: int, outs: int) -> Tensor:
        return gk.sliced_conv2d(x, weight, bias, ins, outs, padding=1).relu()

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=None)
    for ins, outs in ((12, 16), (9, 11), (5, 7), (3, 14), (7, 3)):
        x = images((2, 12, 5, 7), form)
        expected = gradients(lambda *t, i=ins, o=outs: run(*t, i, o), [x, weight, bias])
        actual = gradients(lambda *t, i=ins, o=outs: compiled(*t, i, o), [x, weight, bias])
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)
    assert counter.frame_count <= 3  # the first widths, other ones, and the full one again


def test_compiled_with_a_width_for_every_sample(images, gradients):
    torch._dynamo.reset()
    weight, bias = make_weights(8, 6, 3, 3)

    def run(x: Tensor, weight: Tensor, bias: Tensor, ins: Tensor, outs: Tensor) -> Tensor:
        return gk.sliced_conv2d(x, weight, bias, ins, outs, padding=1).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x, both = images((n, 6, 5, 7)), (widths(n, 6), widths(n, 8))
        expected = gradients(lambda *t, w=both: run(*t, *w), [x, weight, bias])
        actual = gradients(lambda *t, w=both: compiled(*t, *w), [x, weight, bias])
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)


def test_autocast():
    x, (weight, bias) = torch.randn(2, 4, 5, 5), make_weights(6, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert gk.sliced_conv2d(x, weight, bias, 2, 3).dtype == torch.bfloat16
        assert gk.sliced_conv2d(x, weight, bias, torch.tensor([2, 3])).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [3, torch.tensor([3, 1])], ids=["int", "tensor"])
def test_layout_of_the_result(width: Any, layout: str, images):
    x = images((2, 4, 5, 6), layout)
    for form in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(6, 4, 3, 3).contiguous(memory_format=form)
        y = gk.sliced_conv2d(x, weight, None, width, 5, padding=1)
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert y.is_contiguous(memory_format=wanted)


def forbid(*_: object) -> Tensor:
    raise AssertionError("the wrong implementation was called")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explicit_backend_is_the_one(backend: str, monkeypatch: pytest.MonkeyPatch):
    for other in op.LAUNCHERS.keys() - {backend}:
        monkeypatch.setitem(op.LAUNCHERS, other, forbid)
    weight, bias = make_weights(8, 8, 3, 3)
    gk.sliced_conv2d(torch.randn(2, 8, 6, 6), weight, bias, torch.tensor([3, 8]), padding=1, backend=backend)


# -- errors ------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)
WIDTH = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 5, 5, 5)}, ValueError, r"x must have 1 to 4 channels.*, got \(2, 5, 5, 5\)"),
        ({"x": X[:, :0]}, ValueError, "x must have 1 to 4 channels"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(K, C / groups, R, S\), got \(4, 3, 3\)"),
        ({"weight": WEIGHT.double()}, TypeError, r"weight must have the dtype of x, .*float32, got torch\.float64"),
        ({"bias": BIAS[:5]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"in_width": 0}, ValueError, "in_width must lie between 1 and 4, got 0"),
        ({"in_width": 5}, ValueError, "in_width must lie between 1 and 4, got 5"),
        ({"out_width": 7}, ValueError, "out_width must lie between 1 and 6, got 7"),
        ({"out_width": 0.5}, TypeError, r"out_width must be an int, a tensor of ints or None, got 0\.5"),
        ({"out_width": True}, TypeError, "out_width must be an int, a tensor of ints or None, got True"),
        ({"out_width": WIDTH.float()}, TypeError, r"out_width must have dtype torch\.int32 or torch\.int64, got .*32"),
        ({"in_width": WIDTH[:1]}, ValueError, r"in_width must have shape \(2,\), one for every sample, got \(1,\)"),
        ({"in_width": WIDTH.to("meta")}, ValueError, "in_width must be on the device of x, cpu, got meta"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": 1.0}, TypeError, r"groups must be an int, got 1\.0"),
        ({"groups": 4}, ValueError, "groups must divide 16 and 6 channels, got 4"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"x": X[..., :2]}, ValueError, r"x must be at least as large as the window \(3, 3\)"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, reference, .*cuda, got 'fast'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(error, match=message):
        gk.sliced_conv2d(**arguments)


@needs_cpu
@pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[2:8], (16, 64, 32, 16, 16, 1, 1)], ids=str)
def test_a_width_is_a_plan_without_a_list(shape: Sequence[int], images):
    """One mechanism: the gated convolution of masks that are prefixes has lists, and the same bits."""
    n, c, k, h, w, side, stride = shape
    x, (weight, bias) = images((n, c, h, w), "channels_last"), make_weights(k, c, side, side)
    options = {"stride": stride, "padding": side // 2, "backend": "cpu"}
    ins, outs = widths(n, c), widths(n, k)
    in_blocks = n * h * w > 2048  # the other kernel
    sliced = gk.sliced_conv2d(x, weight, bias, ins, None if in_blocks else outs, **options)
    gated = gk.gated_conv2d(x, weight, bias, prefix(ins, c), None if in_blocks else prefix(outs, k), **options)
    assert torch.equal(sliced, gated)


@needs_cpu
@pytest.mark.parametrize("side", [1, 3])
def test_filters_of_any_strides_have_the_same_bits(side: int, images):
    """Rows of weights are read as they lie, or turned: a piece of the filters at a time."""
    x, weight = images((3, 37, 4, 5), "channels_last"), torch.randn(30, 37, side, side)
    ins, outs = torch.tensor([37, 5, 20]), torch.tensor([7, 30, 13])
    forms = [
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    results = [gk.sliced_conv2d(x, each, None, ins, outs, padding=side // 2, backend="cpu") for each in forms]
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpu
def test_a_known_call_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    x, (weight, bias) = torch.randn(2, 8, 5, 7), make_weights(8, 8, 3, 3)
    policy.forget()

    def run(x: Any = x, ins: Any = WIDTH, weight: Any = weight, padding: int = 1) -> Tensor:
        return gk.sliced_conv2d(x, weight, bias, ins, WIDTH + 4, padding=padding)

    expected, fewer = run(), run(x[:, :6])
    monkeypatch.setattr(op.arguments, "check_images", forbid)
    assert torch.equal(run(), expected)
    others = [
        {"ins": WIDTH.int()}, {"ins": 2}, {"ins": None}, {"x": x[:, :6]}, {"padding": 0},
        {"x": x.contiguous(memory_format=torch.channels_last)}, {"weight": weight.clone().requires_grad_()},
    ]  # fmt: skip
    for change in others:
        with pytest.raises(AssertionError, match="the wrong implementation was called"):
            run(**change)
    monkeypatch.undo()
    assert torch.equal(run(x[:, :6]), fewer)
    assert torch.equal(run(ins=WIDTH.int()), expected)


def test_neighbours_of_equal_width_are_views():
    x = torch.randn(6, 4, 2, 2)
    found = list(equal_widths(torch.tensor([2, 2, 4, 1, 4, 1]), None, 6, (4, 3)))
    assert [(ins, outs) for _, ins, outs in found] == [(2, 3), (4, 3), (1, 3)]
    assert found[0][0] == slice(0, 2) and found[1][0].tolist() == [2, 4] and found[2][0].tolist() == [3, 5]
    assert take(x, found[0][0], 1, 2).data_ptr() == x.data_ptr()
    for samples, ins, _ in found:
        part = take(x, samples, 1, ins)
        y = torch.zeros_like(x)
        put(y, samples, 1, part)
        assert y.count_nonzero() == part.numel() and torch.equal(take(y, samples, 1, ins), part)
