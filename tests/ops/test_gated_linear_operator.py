"""The operator ``gated_linear``: registered, compiled, exported; who serves a call, and what is refused."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels import _extension, policy
from gatedkernels.ops.gated_linear import op
from gatedkernels.ops.gated_linear.reference import gated_linear_reference

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def make_mask(lead: int | Sequence[int], channels: int, density: float) -> Tensor:
    lead = (lead,) if isinstance(lead, int) else lead
    return torch.rand(*lead, channels) < density


def make_weights(k: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(k, c).to(dtype), torch.randn(k).to(dtype)


def forbid(*_: object) -> Tensor:
    raise AssertionError("the wrong implementation was called")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", ["both masks", "no masks", "by token", "no tokens", "empty batch"])
def test_registration(backend: str, grad: bool, case: str):
    n = 0 if case == "empty batch" else 2
    tokens = () if case == "no tokens" else (9,)
    x = torch.randn(n, *tokens, 5).requires_grad_(grad)
    weight, bias = (t.requires_grad_(grad) for t in make_weights(7, 5))
    lead = (n, *tokens) if case == "by token" else n
    masks = (None, None) if case == "no masks" else (make_mask(lead, 5, 0.5), make_mask(n, 7, 0.5))
    torch.library.opcheck(
        torch.ops.gatedkernels.gated_linear.default, (x, weight, bias, *masks, case == "no tokens", backend, 0.6)
    )


@pytest.mark.parametrize("output_mask", [(True, True, True), (False, True, False)], ids=str)
def test_registration_of_the_gradient(output_mask: tuple[bool, ...]):
    x, (weight, _), dy = torch.randn(2, 9, 5), make_weights(7, 5), torch.randn(2, 9, 7)
    masks = make_mask(2, 5, 0.5), make_mask(2, 7, 0.5)
    torch.library.opcheck(
        torch.ops.gatedkernels.gated_linear_backward.default,
        (dy, x, weight, *masks, False, output_mask, "reference", 1.0),
    )


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]):
    out_mask = make_mask(2, 12, 0.5)
    tensors = [t.requires_grad_(need) for t, need in zip((torch.randn(2, 9, 8), *make_weights(12, 8)), needs)]  # noqa: B905
    gk.gated_linear(*tensors, None, out_mask).sum().backward()
    assert tuple(t.grad is not None for t in tensors) == needs


class Network(nn.Module):
    """Two layers of a multilayer perceptron, gated between them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1, self.weight2 = nn.Parameter(torch.randn(40, 8)), nn.Parameter(torch.randn(8, 40))
        self.bias = nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """One output-gated and one input-gated layer."""
        hidden = gk.gated_linear(x, self.weight1, self.bias, out_mask=mask).relu()
        return gk.gated_linear(hidden, self.weight2, in_mask=mask, dense_input_grad=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str):
    torch.compiler.reset()
    network = Network()
    compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=True)
    for n, t in ((2, 9), (3, 11)):
        x, mask = torch.randn(n, t, 8), make_mask(n, 40, 0.4)
        torch.testing.assert_close(compiled(x, mask), network(x, mask))
        gradients = []
        for run in (compiled, network):
            network.zero_grad()
            run(x, mask).square().sum().backward()
            gradients.append([p.grad.clone() for p in network.parameters()])
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_compiled_as_the_first_call_of_a_process(tmp_path: Path):
    script = (
        "import torch, gatedkernels as gk\n"
        "run = torch.compile(lambda x, w, m: gk.gated_linear(x, w, None, m), fullgraph=True, backend='eager')\n"
        "x, w, m = torch.randn(2, 9, 4), torch.randn(3, 4), torch.rand(2, 4) < 0.5\n"
        "torch.testing.assert_close(run(x, w, m), (x * m[:, None]) @ w.T)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exported_with_any_batch():
    network = Network().eval()
    n = torch.export.Dim("n", min=1, max=64)
    example = torch.randn(3, 9, 8), make_mask(3, 40, 0.4)
    exported = torch.export.export(network, example, dynamic_shapes=({0: n}, {0: n})).module()
    for batch in (1, 5):
        x, mask = torch.randn(batch, 9, 8), make_mask(batch, 40, 0.4)
        torch.testing.assert_close(exported(x, mask), network(x, mask))


# -- which implementation ----------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize(("density", "unused"), [(0.25, "dense"), (1.0, "cpu")])
def test_dense_serves_above_the_threshold(density: float, unused: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(op.LAUNCHERS, unused, forbid)
    monkeypatch.setattr(policy, "choose_linear", lambda *_: policy.Choice("cpu", 0.7))
    x, (weight, bias) = torch.randn(2, 20, 32), make_weights(32, 32)
    mask = torch.arange(32).expand(2, 32) < 32 * density
    y = gk.gated_linear(x, weight, bias, None, mask)
    expected = gated_linear_reference(x, weight, bias, None, mask)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("backend", ["reference", "dense", "cpu"])
def test_an_explicit_backend_is_the_one(backend: str, density: float, monkeypatch: pytest.MonkeyPatch):
    for other in {"reference", "dense", "cpu"} - {backend}:
        monkeypatch.setitem(op.LAUNCHERS, other, forbid)
    gk.gated_linear(torch.randn(2, 9, 8), *make_weights(8, 8), make_mask(2, 8, density), backend=backend)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_cpu_backend_says_what_it_does_not_serve(dtype: torch.dtype):
    weight, bias = make_weights(4, 4, dtype)
    with pytest.raises(ValueError, match=rf"backend 'cpu' computes in torch\.float32, got x of {dtype}"):
        gk.gated_linear(torch.randn(2, 9, 4).to(dtype), weight, bias, backend="cpu")


# -- errors ------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.zeros(2, 5, 4), torch.zeros(6, 4), torch.zeros(6)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": X[0, 0]}, ValueError, r"x must have shape \(N, \.\.\., C\), got \(4,\)"),
        ({"x": X.int()}, TypeError, r"x must have a dtype of .*, got torch\.int32"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(K, C\), got \(4,\)"),
        ({"weight": WEIGHT[:, :3]}, ValueError, r"weight must have shape \(6, 4\), got \(6, 3\)"),
        ({"weight": WEIGHT.double()}, TypeError, r"weight must have the dtype of x, .*float32, got torch\.float64"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"bias": BIAS[:5]}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"bias": BIAS.half()}, TypeError, r"bias must have the dtype of x, torch\.float32, got torch\.float16"),
        ({"in_mask": MASK.float()}, TypeError, r"in_mask must have dtype torch\.bool, got torch\.float32"),
        ({"in_mask": [[True]]}, TypeError, "in_mask must be a tensor, got list"),
        ({"in_mask": MASK[:1]}, ValueError, r"in_mask must have shape \(2, 4\) or \(2, 5, 4\), got \(1, 4\)"),
        ({"x": X[:, 0], "in_mask": MASK[:1]}, ValueError, r"in_mask must have shape \(2, 4\), got \(1, 4\)"),
        ({"in_mask": MASK.to("meta")}, ValueError, "in_mask must be on the device of x"),
        ({"out_mask": MASK}, ValueError, r"out_mask must have shape \(2, 6\) or \(2, 5, 6\), got \(2, 4\)"),
        ({"in_mask": MASK, "group": 3}, ValueError, "group must divide the 4 channels that in_mask decides on, got 3"),
        ({"in_mask": MASK, "group": 2}, ValueError, r"in_mask must have shape \(2, 2\) or \(2, 5, 2\), got \(2, 4\)"),
        ({"in_mask": MASK, "group": 0}, ValueError, "group must divide"),
        ({"in_mask": MASK, "group": "2"}, TypeError, "group must be an int, got '2'"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, reference, .*cuda, got 'fast'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, .* for this operation, got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(error, match=message):
        gk.gated_linear(**arguments)
