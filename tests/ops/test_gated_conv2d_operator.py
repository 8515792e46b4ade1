"""The operator ``gated_conv2d``: registered, compiled, exported; who serves a call, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels import _extension, policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops.gated_conv2d import op
from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_reference

GEOMETRY = ((1, 1), (1, 1), (1, 1))

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def make_mask(n: int, channels: int, density: float = 0.5) -> Tensor:
    return torch.rand(n, channels) < density


def make_weights(k: int, c: int, *size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(k, c, *size), torch.randn(k)


def forbid(*_: object) -> Tensor:
    raise AssertionError("the wrong implementation was called")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", ["both masks", "no masks", "channels last", "empty batch"])
def test_registration(backend: str, grad: bool, case: str, images):
    n = 0 if case == "empty batch" else 2
    x = images((n, 5, 4, 6), "channels_last" if case == "channels last" else "contiguous").requires_grad_(grad)
    weight, bias = (t.requires_grad_(grad) for t in make_weights(7, 5, 3, 3))
    masks = (None, None) if case == "no masks" else (make_mask(n, 5), make_mask(n, 7))
    torch.library.opcheck(
        torch.ops.gatedkernels.gated_conv2d.default,
        (x, weight, bias, *masks, *GEOMETRY, 1, case == "channels last", backend, 0.6),
    )


@pytest.mark.parametrize("output_mask", [(True, True, True), (False, True, False)], ids=str)
def test_registration_of_the_backward(output_mask: tuple[bool, ...], images):
    x, (weight, _) = images((2, 5, 4, 6)), make_weights(7, 5, 3, 3)
    torch.library.opcheck(
        torch.ops.gatedkernels.gated_conv2d_backward.default,
        (torch.randn(2, 7, 4, 6), x, weight, make_mask(2, 5), make_mask(2, 7), *GEOMETRY, 1, False,
         list(output_mask), "reference", 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend: str, dynamic: bool, images, gradients):
    torch._dynamo.reset()

    def run(x: Tensor, weight: Tensor, bias: Tensor, in_mask: Tensor, out_mask: Tensor) -> Tensor:
        y = gk.gated_conv2d(x, weight, bias, in_mask, out_mask, stride=2, padding=1, group=2, backend=backend)
        return y.relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    weight, bias = make_weights(8, 6, 3, 3)
    for n, form in ((2, "contiguous"), (3, "channels_last")):
        x, masks = images((n, 6, 5, 7), form), (make_mask(n, 3), make_mask(n, 4))
        expected = gradients(lambda *t, m=masks: run(*t, *m), [x, weight, bias])
        actual = gradients(lambda *t, m=masks: compiled(*t, *m), [x, weight, bias])
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)
            assert a.stride() == e.stride()


def test_compiled_call_comes_first(tmp_path: Path):
    code = """
import torch
import gatedkernels as gk
x, weight, mask = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3), torch.rand(2, 8) < 0.5
run = lambda x, w: gk.gated_conv2d(x, w, None, None, mask, padding=1)
compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight)
torch.testing.assert_close(compiled, run(x, weight))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


class Masked(nn.Module):
    """The operation as a part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor, in_mask: Tensor, out_mask: Tensor) -> Tensor:
        return gk.gated_conv2d(x, self.conv.weight, self.conv.bias, in_mask, out_mask, padding=1)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_exported_with_any_batch(form: str, images):
    model = Masked().eval()

    def arguments(n: int) -> tuple[Tensor, ...]:
        return images((n, 6, 5, 7), form), torch.rand(n, 6) < 0.5, torch.rand(n, 8) < 0.5

    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in ("x", "in_mask", "out_mask")}
    program = torch.export.export(model, arguments(3), dynamic_shapes=shapes)
    for n in (1, 2, 7):
        given_ = arguments(n)
        actual, expected = program.module()(*given_), model(*given_)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


# -- choice of the implementation --------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gated", ["outputs", "inputs", "both"])
@pytest.mark.parametrize(("density", "dense"), [(0.3, False), (0.8, True), (1.0, True)])
def test_auto_compares_the_density(
    density: float, dense: bool, gated: str, form: str, images, called, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(policy, "choose", lambda *_, **__: policy.Choice("cpu", 0.7))
    policy.forget()
    x, (weight, bias) = images((2, 30, 6, 5), form), make_weights(30, 30, 3, 3)
    mask = torch.arange(30).expand(2, 30) < round(30 * density)
    masks = (None if gated == "outputs" else mask, None if gated == "inputs" else mask)
    expected = gated_conv2d_reference(x, weight, bias, *masks, *GEOMETRY, 1)
    if gated != "outputs":
        x = x.masked_fill(~mask[..., None, None], torch.nan)  # closed channels of x are not read
    for _ in range(2):  # the second call is a known one
        y, names = called(lambda: gk.gated_conv2d(x, weight, bias, *masks, padding=1))
        assert ("aten::_convolution" in names) == dense
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert y.stride() == expected.contiguous(memory_format=arguments.memory_format(x)).stride()


@needs_cpu
def test_registration_of_the_kernels_operator(images):
    x, (weight, bias) = images((2, 5, 4, 6)), make_weights(7, 5, 3, 3)
    for threshold in (2.0, -1.0):
        torch.library.opcheck(
            torch.ops.gatedkernels.gated_conv2d_cpu.default,
            (x, weight, bias, None, make_mask(2, 7), threshold, 2),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_cpu
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("backend", ["reference", "dense", "cpu"])
def test_an_explicit_backend_is_the_one(backend: str, density: float, images, called, monkeypatch: pytest.MonkeyPatch):
    for other in {"reference", "dense", "cpu"} - {backend}:
        monkeypatch.setitem(op.LAUNCHERS, other, forbid)
    weight, bias = make_weights(8, 8, 3, 3)
    mask = make_mask(2, 8, density)
    _, names = called(lambda: gk.gated_conv2d(images((2, 8, 6, 6)), weight, bias, mask, padding=1, backend=backend))
    assert ("aten::_convolution" in names) == (backend != "cpu")


def test_choice_looks_at_static_facts_only():
    x, weight = torch.empty(2, 8, 4, 4, device="meta"), torch.empty(8, 8, 3, 3, device="meta")
    assert policy.choose("conv_out", x, weight, *GEOMETRY, 1).backend == "dense"
    assert gk.gated_conv2d(x, weight, padding=1).is_meta


@needs_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, r"computes in torch\.float32, got x of torch\.float64"),
        ({"dtype": torch.bfloat16}, r"got x of torch\.bfloat16"),
        ({"padding": 0}, r"serves 3x3 filters with padding 1 .* got \(3, 3\) with padding \(0, 0\)"),
        ({"size": (5, 5), "padding": 2}, r"got \(5, 5\)"),
        ({"stride": 3}, r"serves strides 1 and 2, got \(3, 3\)"),
        ({"stride": (1, 2)}, r"serves strides 1 and 2, got \(1, 2\)"),
        ({"dilation": 2}, r"got dilation \(2, 2\)"),
        ({"groups": 2}, "groups 2"),
    ],
)
def test_the_cpu_backend_says_what_it_does_not_serve(change: dict[str, Any], message: str):
    options = {"dtype": torch.float32, "size": (3, 3), "padding": 1, "groups": 1, **change}
    dtype, size = options.pop("dtype"), options.pop("size")
    x, *rest = (t.to(dtype) for t in (torch.randn(2, 4, 9, 9), *make_weights(4, 4 // options["groups"], *size)))
    with pytest.raises(ValueError, match=f"backend 'cpu' .*{message}"):
        gk.gated_conv2d(x, *rest, backend="cpu", **options)


# -- errors ------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must have shape \(N, C, H, W\), got \(4, 5, 5\)"),
        ({"x": X.int()}, TypeError, r"x must have a dtype of .*, got torch\.int32"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(K, C / groups, R, S\), got \(4, 3, 3\)"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"weight must have shape \(6, 4, 3, 3\), got \(6, 3, 3, 3\)"),
        ({"weight": WEIGHT.double()}, TypeError, r"weight must have the dtype of x, .*float32, got torch\.float64"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ({"x": X.bfloat16()}, TypeError, r"weight must have the dtype of x, torch\.bfloat16"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"bias": BIAS[:5]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"bias": BIAS.half()}, TypeError, r"bias must have the dtype of x, torch\.float32, got torch\.float16"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias must be on the device of x"),
        ({"in_mask": MASK.float()}, TypeError, r"in_mask must have dtype torch\.bool, got torch\.float32"),
        ({"in_mask": [[True]]}, TypeError, "in_mask must be a tensor, got list"),
        ({"in_mask": MASK[:1]}, ValueError, r"in_mask must have shape \(2, 4\), got \(1, 4\)"),
        ({"in_mask": MASK.to("meta")}, ValueError, "in_mask must be on the device of x"),
        ({"out_mask": MASK}, ValueError, r"out_mask must have shape \(2, 6\), got \(2, 4\)"),
        ({"out_mask": torch.ones(2, 6, dtype=torch.int64)}, TypeError, r"out_mask must have dtype torch\.bool"),
        ({"in_mask": MASK, "group": 3}, ValueError, "group must divide the 4 channels that in_mask decides on, got 3"),
        ({"in_mask": MASK, "group": 2}, ValueError, r"in_mask must have shape \(2, 2\), got \(2, 4\)"),
        ({"in_mask": MASK, "group": 0}, ValueError, "group must divide"),
        ({"in_mask": MASK, "group": "2"}, TypeError, "group must be an int, got '2'"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": 1.5}, TypeError, r"stride must be an int or two ints, got 1\.5"),
        ({"stride": (1, 1, 1)}, TypeError, "stride must be an int or two ints"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"padding": "same"}, TypeError, "padding must be an int or two ints, got 'same'"),
        ({"dilation": (1, 0)}, ValueError, r"dilation must be at least 1, got \(1, 0\)"),
        ({"groups": 0}, ValueError, "groups must divide 4 and 6 channels, got 0"),
        ({"groups": 4}, ValueError, "groups must divide 4 and 6 channels, got 4"),
        ({"groups": 1.0}, TypeError, r"groups must be an int, got 1\.0"),
        ({"x": X[..., :2]}, ValueError, r"x must be at least as large as the window \(3, 3\), got \(2, 4, 5, 2\)"),
        ({"x": X[..., :0]}, ValueError, "x must be at least as large as the window"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, reference, .*cuda, got 'fast'"),
        ({"backend": "triton"}, ValueError, "backend 'triton' needs tensors on a CUDA device, got x on cpu"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(error, match=message):
        gk.gated_conv2d(**arguments)


@pytest.mark.skipif(_extension.CUDA_ERROR is None, reason="the CUDA library is here")
def test_the_cuda_backend_says_why_it_is_absent():
    with pytest.raises(ValueError, match="backend 'cuda' is not available: "):
        gk.gated_conv2d(X, WEIGHT, BIAS, backend="cuda")


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_forward_mode_is_refused(backend: str):
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    mask = torch.rand(2, 8) < 0.5
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            gk.gated_conv2d(dual, weight, out_mask=mask, padding=1, backend=backend)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            gk.gated_block(dual, weight, None, weight, None, mask, backend=backend)
        gk.gated_conv2d(x, weight, out_mask=mask, padding=1, backend=backend)


def test_a_known_call_lets_no_other_kind_pass():
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    gk.gated_conv2d(x, weight, padding=1)
    with pytest.raises(TypeError, match="padding"):
        gk.gated_conv2d(x, weight, padding=1.0)
