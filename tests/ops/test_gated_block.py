"""The operation ``gated_block``: conv, ReLU, mask, conv, residual, ReLU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels import _extension, policy
from gatedkernels.ops.gated_block import op

# N, C, M (hidden), K, H, W, stride
SHAPES = [
    (2, 16, 16, 16, 8, 8, 1),
    (2, 32, 64, 64, 9, 7, 2),
    (1, 3, 40, 33, 17, 15, 1),
    (5, 70, 35, 70, 4, 4, 1),
    (9, 20, 24, 40, 6, 5, 2),
    (1, 300, 70, 40, 2, 3, 1),  # filters larger than a cache: walked in slices
    (20, 300, 70, 40, 3, 3, 2),
    (2, 5, 3, 2, 1, 2, 2),
    (1, 1, 1, 1, 1, 1, 1),
]
DENSITIES = [0.0, 0.4, 1.0]

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", "dense", pytest.param("cpu", marks=needs_cpu)]


def make(c: int, m: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Both filters and biases, scaled so that the activations keep their size."""
    return [
        (torch.randn(m, c, 3, 3) / (3 * c**0.5)).to(dtype),
        torch.randn(m).to(dtype),
        (torch.randn(k, m, 3, 3) / (3 * m**0.5)).to(dtype),
        torch.randn(k).to(dtype),
    ]


def definition(mask: Tensor, stride: int) -> Callable[..., Tensor]:
    """The masked block as anybody would write it, with the gradients that autograd finds."""

    def run(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None) -> Tensor:
        hidden = conv2d(x, w1, b1, stride, 1).relu()
        y = conv2d(torch.where(mask[:, :, None, None], hidden, 0), w2, b2, 1, 1)
        return (y if residual is None else y + residual).relu()

    return run


def operation(mask: Tensor, stride: int, backend: str = "auto", group: int = 1) -> Callable[..., Tensor]:
    def run(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"residual": residual, "stride": stride, "group": group, "backend": backend}
        return gk.gated_block(x, w1, b1, w2, b2, mask, **options)

    return run


def inputs(shape: tuple[int, ...], images: Callable[..., Tensor], layout: str, dtype: torch.dtype) -> list[Tensor]:
    """x, filters and biases, residual."""
    n, c, m, k, h, w, stride = shape
    residual = images((n, k, (h - 1) // stride + 1, (w - 1) // stride + 1), layout, dtype)
    return [images((n, c, h, w), layout, dtype), *make(c, m, k, dtype), residual]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("stride", [1, 2])
def test_reference_matches_definition(stride: int, density: float, with_residual: bool, images):
    x, w1, b1, w2, b2, residual = inputs((3, 4, 6, 5, 7, 6, stride), images, "contiguous", torch.float64)
    mask = torch.rand(3, 6) < density
    y = operation(mask, stride, "reference")(x, w1, b1, w2, b2, residual if with_residual else None)
    for n in range(3):  # a sample's block is a smaller block: that of its active channels
        m = mask[n]
        expected = b2[None, :, None, None] + (residual[n : n + 1] if with_residual else 0)
        if m.any():
            expected = expected + conv2d(conv2d(x[n : n + 1], w1[m], b1[m], stride, 1).relu(), w2[:, m], None, 1, 1)
        torch.testing.assert_close(y[n], expected.relu().expand(1, *y.shape[1:])[0])


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_gradients(stride: int, images):
    tensors = inputs((2, 3, 4, 3, 5, 4, stride), images, "contiguous", torch.float64)
    mask = torch.rand(2, 4) < 0.5
    assert torch.autograd.gradcheck(operation(mask, stride, "reference"), [t.requires_grad_() for t in tensors])


@needs_cpu
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], density: float, layout: str, images, compare):
    mask, stride = torch.rand(shape[0], shape[2]) < density, shape[-1]
    tensors = inputs(shape, images, layout, torch.float32)
    compare(operation(mask, stride, "cpu"), definition(mask, stride), tensors)


@needs_cpu
@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data())
def test_kernel_serves_any_size(data: st.DataObject, images, compare):
    n, c, m, k = (data.draw(st.integers(1, most), name) for name, most in zip("NCMK", (6, 70, 70, 70), strict=True))
    h, w, stride = (data.draw(st.integers(1, most), name) for name, most in (("H", 20), ("W", 20), ("stride", 2)))
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    mask = torch.rand(n, m) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "density")
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced"]), "layout")
    tensors: list[Tensor | None] = [*inputs((n, c, m, k, h, w, stride), images, layout, torch.float32)]
    for i in data.draw(st.sets(st.sampled_from([2, 4, 5])), "absent"):
        tensors[i] = None
    compare(operation(mask, stride, "cpu"), definition(mask, stride), tensors, rounding=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_serves_every_dtype(stride: int, dtype: torch.dtype, layout: str, images, compare):
    mask = torch.rand(2, 12) < 0.5
    tensors = inputs((2, 6, 12, 7, 9, 8, stride), images, layout, dtype)
    compare(operation(mask, stride), definition(mask, stride), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_is_one_decision_for_neighbours(backend: str, images):
    tensors = inputs((3, 8, 24, 10, 5, 5, 1), images, "contiguous", torch.float32)
    mask = torch.rand(3, 3) < 0.5
    y = operation(mask, 1, backend, group=8)(*tensors)
    assert torch.equal(y, operation(mask.repeat_interleave(8, 1), 1, backend)(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, images, gradients):
    mask = torch.zeros(0, 6, dtype=torch.bool)
    tensors = inputs((0, 4, 6, 5, 5, 7, 2), images, "contiguous", torch.float32)
    y, *gradient = gradients(operation(mask, 2, backend), tensors)
    assert y.shape == (0, 5, 3, 4)
    assert [g.shape for g in gradient] == [t.shape for t in tensors]
    assert not any(g.any() for g in gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_closed_leaves_the_residual(backend: str, images, gradients):
    x, w1, b1, w2, b2, residual = inputs((2, 6, 8, 5, 5, 5, 1), images, "contiguous", torch.float32)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    run = operation(mask, 1, backend)
    assert torch.equal(run(x, w1, b1, w2, b2, residual), (b2[:, None, None] + residual).relu())
    _, dx, dw1, db1, dw2, *_ = gradients(run, [x, w1, b1, w2, b2, residual])
    assert not any(g.any() for g in (dx, dw1, db1, dw2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_closed_channels_does_not_spread(backend: str, images):
    x, w1, b1, w2, b2, residual = inputs((2, 6, 8, 5, 5, 5, 1), images, "contiguous", torch.float32)
    mask = torch.rand(2, 8) < 0.5
    mask[:, 3] = False
    run = operation(mask, 1, backend)
    expected = run(x, w1, b1, w2, b2, residual)
    b1[3] = torch.nan  # makes hidden channel 3 NaN, closed everywhere
    assert torch.equal(run(x, w1, b1, w2, b2, residual), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["x", "residual"])
def test_nan_shows_through_the_relus(backend: str, where: str, images):
    tensors = inputs((2, 6, 8, 5, 5, 5, 1), images, "contiguous", torch.float32)
    tensors[0 if where == "x" else 5][1, 2, 3, 4] = torch.nan
    mask = torch.ones(2, 8, dtype=torch.bool)
    expected = definition(mask, 1)(*tensors).isnan()
    assert expected.any()
    assert torch.equal(operation(mask, 1, backend)(*tensors).isnan(), expected)


def test_permuted_hidden_channels_change_nothing(images):
    x, w1, b1, w2, b2, residual = inputs((3, 9, 20, 12, 6, 6, 1), images, "contiguous", torch.float32)
    mask, order = torch.rand(3, 20) < 0.5, torch.randperm(20)
    y = operation(mask, 1)(x, w1, b1, w2, b2, residual)
    permuted = operation(mask[:, order], 1)(x, w1[order], b1[order], w2[:, order], b2, residual)
    torch.testing.assert_close(permuted, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, images, gradients):
    tensors = inputs((2, 6, 8, 5, 5, 5, 1), images, "contiguous", torch.float32)
    mask = torch.rand(2, 8) < 0.5
    with torch.autocast("cpu", dtype=dtype):
        actual = gradients(operation(mask, 1), tensors)
        expected = gradients(definition(mask, 1), [*tensors[:5], tensors[5].to(dtype).float()])
    assert [t.dtype for t in actual] == [dtype, *[torch.float32] * 6]
    exact = gradients(definition(mask, 1), [t.double() for t in tensors], dtype)
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert (a - x).norm() <= 3 * (e - x).norm() + 2 * torch.finfo(dtype).eps * x.norm()


def significant_strides(x: Tensor) -> list[int]:
    """Strides along the dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1] if x.numel() else []


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 1, 5, 6), (1, 8, 1, 1), (0, 8, 5, 6)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_memory_format_is_a_function_of_the_input_alone(shape: tuple[int, ...], density: float, layout: str, images):
    n, c, h, w = shape
    x, w1, b1, w2, b2, residual = inputs((n, c, 10, 7, h, w, 1), images, layout, torch.float32)
    mask = torch.rand(n, 10) < density
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if is_last else torch.contiguous_format
    expected = significant_strides(torch.empty(n, 7, h, w).to(memory_format=form))
    for backend in ("reference", "dense", "auto", *(["cpu"] if _extension.CPU_ERROR is None else [])):
        for skip in (None, residual):
            assert significant_strides(operation(mask, 1, backend)(x, w1, b1, w2, b2, skip)) == expected, backend
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w1, b1, w2, b2, residual)]
        fake = operation(mode.from_tensor(mask), 1)(*fakes)
    assert fake.shape == (n, 7, h, w)
    assert significant_strides(fake) == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("n", [0, 2])
def test_registration(backend: str, grad: bool, n: int, images):
    tensors = inputs((n, 4, 6, 5, 5, 4, 2), images, "channels_last", torch.float32)
    *before, residual = [t.requires_grad_(grad) for t in tensors]
    mask = torch.rand(n, 6) < 0.5
    torch.library.opcheck(torch.ops.gatedkernels.gated_block.default, (*before, mask, residual, (2, 2), backend))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend: str, dynamic: bool, images, gradients):
    torch._dynamo.reset()

    def run(mask: Tensor, *tensors: Tensor) -> Tensor:
        return operation(mask, 1, backend, group=2)(*tensors) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, form in ((2, "contiguous"), (3, "channels_last")):
        tensors, mask = inputs((n, 6, 8, 6, 5, 4, 1), images, form, torch.float32), torch.rand(n, 4) < 0.5
        expected = gradients(lambda *t, m=mask: run(m, *t), tensors)
        actual = gradients(lambda *t, m=mask: compiled(m, *t), tensors)
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)


class Block(nn.Module):
    """The operation as a part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        one, two = self.conv1, self.conv2
        return gk.gated_block(x, one.weight, one.bias, two.weight, two.bias, mask, residual=x)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_exported_with_any_batch(form: str, images):
    model, batch = Block().eval(), torch.export.Dim("batch")
    example = images((3, 6, 7, 5), form), torch.rand(3, 8) < 0.5
    program = torch.export.export(model, example, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    for n in (1, 5):
        arguments = images((n, 6, 7, 5), form), torch.rand(n, 8) < 0.5
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


@needs_cpu
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("density", "dense"), [(0.5, False), (0.75, True), (1.0, True)])
def test_auto_compares_the_density(
    density: float, dense: bool, stride: int, form: str, images, called, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(policy, "choose", lambda *_, **__: policy.Choice("cpu", 0.7))
    policy.forget()
    tensors = inputs((2, 6, 8, 5, 5, 7, stride), images, form, torch.float32)
    mask = torch.arange(8).expand(2, 8) < 8 * density
    expected = definition(mask, stride)(*tensors)
    for _ in range(2):  # the second call is a known one
        y, names = called(lambda: operation(mask, stride)(*tensors))
        assert ("aten::_convolution" in names) == dense
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert y.is_contiguous(memory_format=getattr(torch, f"{form}_format" if form == "contiguous" else form))


@needs_cpu
@pytest.mark.parametrize("backend", ["reference", "dense", "cpu"])
def test_an_explicit_backend_is_the_one(backend: str, images, called, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op, "LAUNCHERS", {backend: op.LAUNCHERS[backend]})
    tensors = inputs((2, 6, 8, 5, 5, 5, 1), images, "contiguous", torch.float32)
    _, names = called(lambda: operation(torch.ones(2, 8, dtype=torch.bool), 1, backend)(*tensors))
    assert ("aten::_convolution" in names) == (backend != "cpu")


X, RESIDUAL, MASK = torch.zeros(2, 4, 5, 5), torch.zeros(2, 3, 5, 5), torch.ones(2, 6, dtype=torch.bool)
W1, B1, W2, B2 = torch.zeros(6, 4, 3, 3), torch.zeros(6), torch.zeros(3, 6, 3, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \(N, C, H, W\), got \(4, 5, 5\)"),
        ({"x": X[..., :0]}, ValueError, "x must be at least as large as the window"),
        ({"x": "x"}, TypeError, "x must be a tensor, got str"),
        ({"weight1": W1[:, :2]}, ValueError, r"weight1 must have shape \(6, 4, 3, 3\), got \(6, 2, 3, 3\)"),
        ({"weight1": W1[..., :1]}, ValueError, r"weight1 must hold 3x3 filters, got \(6, 4, 3, 1\)"),
        ({"weight1": W1.double()}, TypeError, "weight1 must have the dtype of x"),
        ({"bias1": B2}, ValueError, r"bias1 must have shape \(6,\), got \(3,\)"),
        ({"weight2": W1}, ValueError, r"weight2 must have shape \(6, 6, 3, 3\), got \(6, 4, 3, 3\)"),
        ({"weight2": W2[..., :1, :1]}, ValueError, r"weight2 must hold 3x3 filters, got \(3, 6, 1, 1\)"),
        ({"weight2": None}, TypeError, "weight2 must be a tensor, got NoneType"),
        ({"bias2": B1}, ValueError, r"bias2 must have shape \(3,\), got \(6,\)"),
        ({"mask": None}, TypeError, "mask must be a tensor, got None"),
        ({"mask": MASK.float()}, TypeError, r"mask must have dtype torch\.bool, got torch\.float32"),
        ({"mask": MASK[:, :4]}, ValueError, r"mask must have shape \(2, 6\), got \(2, 4\)"),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of x, cpu, got meta"),
        ({"group": 4}, ValueError, "group must divide the 6 channels that mask decides on, got 4"),
        ({"residual": RESIDUAL[:1]}, ValueError, r"residual must have shape \(2, 3, 5, 5\), got \(1, 3, 5, 5\)"),
        ({"stride": 2}, ValueError, r"residual must have shape \(2, 3, 3, 3\), got \(2, 3, 5, 5\)"),
        ({"residual": RESIDUAL.half()}, TypeError, "residual must have the dtype of x"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, reference, dense, cpu, triton for this"),
        ({"backend": "tpu"}, ValueError, "backend must be one of .*, got 'tpu'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"x": X, "weight1": W1, "bias1": B1, "weight2": W2, "bias2": B2, "mask": MASK, "residual": RESIDUAL}
    with pytest.raises(error, match=message):
        gk.gated_block(**{**arguments, **change})


@needs_cpu
def test_the_cpu_backend_says_what_it_does_not_serve():
    with pytest.raises(ValueError, match=r"backend 'cpu' serves strides 1 and 2, got \(3, 3\)"):
        gk.gated_block(X, W1, B1, W2, B2, MASK, stride=3, backend="cpu")
    with pytest.raises(ValueError, match=r"backend 'cpu' computes in torch\.float32, got x of torch\.float64"):
        gk.gated_block(*(t.double() for t in (X, W1, B1, W2, B2)), MASK, backend="cpu")
