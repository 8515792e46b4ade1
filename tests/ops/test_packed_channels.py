"""What holds for both operations on packed channels, ``conv_out`` that writes them and ``conv_in`` that reads them."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.conv_in import op as conv_in_op
from gatedkernels.ops.conv_out import op as conv_out_op

C, K = 5, 7
GEOMETRY = ((1, 1), (1, 1), (1, 1))

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
# The public function, the module that launches it, and how many channels its mask decides about
OPERATIONS = [
    pytest.param((gk.conv_out, conv_out_op, K), id="conv_out"),
    pytest.param((gk.conv_in, conv_in_op, C), id="conv_in"),
]

Operation = tuple[Callable[..., Tensor], ModuleType, int]


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    return request.param


def make_tensors(images: Callable[..., Tensor], n: int, layout: str = "contiguous") -> list[Tensor]:
    """Images, filters, bias."""
    return [images((n, C, 8, 6), layout), torch.randn(K, C, 3, 3), torch.randn(K)]


def make_mask(n: int, channels: int) -> Tensor:
    return torch.rand(n, channels) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, operation: Operation, images, gradients):
    function, _, decided = operation
    plan = gk.plan(make_mask(0, decided))
    y, dx, dweight, dbias = gradients(
        lambda *t: function(*t, *plan, padding=1, stride=2, backend=backend), make_tensors(images, 0)
    )
    assert y.shape == (0, K, 4, 3)
    assert dx.shape == (0, C, 8, 6)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_is_contiguous(backend: str, operation: Operation, layout: str, images):
    function, _, decided = operation
    plan = gk.plan(make_mask(2, decided))
    assert function(*make_tensors(images, 2, layout), *plan, padding=1, backend=backend).is_contiguous()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own looking
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("n", "layout_"), [(0, "contiguous"), (2, "contiguous"), (2, "channels_last")])
def test_registration(backend: str, grad: bool, n: int, layout_: str, operation: Operation, images):
    function, _, decided = operation
    tensors = [t.requires_grad_(grad) for t in make_tensors(images, n, layout_)]
    registered = getattr(torch.ops.gatedkernels, function.__name__).default
    # The last option but one is conv_out's relu and conv_in's dense_input_grad.
    torch.library.opcheck(registered, (*tensors, *gk.plan(make_mask(n, decided)), *GEOMETRY, grad, backend))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("option", [False, True])
def test_compiled(dynamic: bool, option: bool, operation: Operation, images, gradients):
    function, _, decided = operation
    torch._dynamo.reset()
    options: dict[str, Any] = {"relu" if function is gk.conv_out else "dense_input_grad": option}

    def run(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return function(x, weight, bias, *gk.plan(mask), padding=1, stride=2, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        tensors, mask = make_tensors(images, n), make_mask(n, decided)
        expected = gradients(lambda *t, m=mask: run(*t, m), tensors)
        actual = gradients(lambda *t, m=mask: compiled(*t, m), tensors)
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)


class Convolving(nn.Module):
    """The operation as a part of a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(C, K, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(x, self.conv.weight, self.conv.bias, *gk.plan(mask), padding=1)


def test_exported_with_any_batch(operation: Operation, images):
    function, _, decided = operation
    model, batch = Convolving(function).eval(), torch.export.Dim("batch")

    def arguments(n: int) -> tuple[Tensor, Tensor]:
        return images((n, C, 7, 6)), make_mask(n, decided)

    program = torch.export.export(model, arguments(3), dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    for n in (1, 5):
        given = arguments(n)
        torch.testing.assert_close(program.module()(*given), model(*given))


@needs_cpu
def test_an_explicit_backend_is_the_one(operation: Operation, images, monkeypatch: pytest.MonkeyPatch):
    function, module, decided = operation
    tensors, plan = make_tensors(images, 2), gk.plan(make_mask(2, decided))
    for backend in ("reference", "cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "LAUNCHERS", {backend: module.LAUNCHERS[backend]})
            function(*tensors, *plan, padding=1, backend=backend)
    for options in ({"padding": 0}, {"padding": 1, "stride": 3}, {"padding": 1, "dilation": 2}):
        with pytest.raises(ValueError, match="backend 'cpu' serves"):
            function(*tensors, *plan, backend="cpu", **options)
    with pytest.raises(ValueError, match=r"backend 'cpu' computes in torch\.float32, got x of torch\.float64"):
        function(*(t.double() for t in tensors), *plan, padding=1, backend="cpu")


@needs_cpu
@pytest.mark.parametrize(
    "damage",
    [
        lambda index, count: (index + index.shape[1], count),
        lambda index, count: (index - index.shape[1] - 1, count),
        lambda index, count: (index, count + index.shape[1]),
        lambda index, count: (index, -count),
    ],
    ids=["index too large", "index negative", "count too large", "count negative"],
)
def test_a_broken_plan_reads_no_foreign_memory(damage: Callable[..., Any], operation: Operation, images):
    function, _, decided = operation
    index = torch.arange(decided, dtype=torch.int32).repeat(2, 1)
    plan = damage(index, torch.full((2,), 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"count must lie between|index must name channels"):
        function(*make_tensors(images, 2), *plan, padding=1, backend="cpu")
