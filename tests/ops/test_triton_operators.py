"""The operators that Triton serves: registered, compiled, exported; on a GPU, or interpreted (see test_triton.py)."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # opcheck's own looking
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
C, K = 4, 16  # channels of the inputs, and of what masks decide about and what comes out
ONES = (1, 1)
WINDOW = (ONES, ONES, ONES)


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=grad)


def draw(samples: int, channels: int = K) -> Tensor:
    return torch.rand(samples, channels, device=DEVICE) < 0.5


def widths(samples: int, most: int) -> Tensor:
    return torch.randint(1, most + 1, (samples,), dtype=torch.int32, device=DEVICE)


def conv(grad: bool, images: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    images = randn(2, C, 3, 2, grad=grad) if images is None else images
    return images, randn(K, images.shape[1], 3, 3, grad=grad), randn(K, grad=grad)


def block(grad: bool) -> tuple[Tensor, ...]:
    return *conv(grad), randn(K, K, 3, 3, grad=grad), randn(K, grad=grad), draw(2)


def plan() -> tuple[Tensor, Tensor]:
    return gk.plan(draw(2))


# Arguments by operator; those that take part in training have gradients.
ARGUMENTS: dict[str, Callable[[bool], tuple[Any, ...]]] = {
    "plan": lambda grad: (draw(2),),
    "conv_out": lambda grad: (*conv(grad), *plan(), *WINDOW, True, "triton"),
    "conv_in": lambda grad: (*conv(grad, randn(2, K, 3, 2, grad=grad)), *plan(), *WINDOW, False, "triton"),
    "gated_conv2d": lambda grad: (*conv(grad), draw(2, C), draw(2), *WINDOW, 1, False, "triton", 2.0),
    "gated_block": lambda grad: (*block(grad), None, ONES, "triton"),
    "gated_linear": lambda grad: (
        randn(2, 3, C, grad=grad), randn(K, C, grad=grad), randn(K, grad=grad), draw(2, C), draw(2), False, "triton",
        2.0,
    ),
    "sliced_conv2d": lambda grad: (*conv(grad), widths(2, C), widths(2, K), *WINDOW, 1, "triton"),
    "sliced_linear": lambda grad: (
        randn(2, 3, C, grad=grad), randn(K, C, grad=grad), randn(K, grad=grad), widths(2, C), widths(2, K), "triton"
    ),
}  # fmt: skip
# Two sides, of which the device chooses one: nothing is trained through them.
SWITCHED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gated_conv2d": lambda: (*conv(False), None, draw(2), *WINDOW, 1, False, "triton", 0.5),
    "gated_linear": lambda: (randn(2, 3, C), randn(K, C), randn(K), None, draw(2), False, "triton", 0.5),
    "switched_block": lambda: (*block(False), None, ONES, 0.5),
    "shared_block": lambda: (*block(False), None, ONES, 2),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_registration(name: str, grad: bool):
    torch.library.opcheck(getattr(torch.ops.gatedkernels, name).default, ARGUMENTS[name](grad))


@pytest.mark.parametrize("name", SWITCHED)
def test_registration_of_what_switches(name: str):
    torch.library.opcheck(getattr(torch.ops.gatedkernels, name).default, SWITCHED[name]())


class Served(nn.Module):
    """One of the public operations on Triton, with its weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight, self.bias = nn.Parameter(randn(K, C, 3, 3)), nn.Parameter(randn(K))
        self.weight2 = nn.Parameter(randn(K, K, 3, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The operation; widths are the numbers of open channels."""
        options: dict[str, Any] = {"backend": "triton"}
        taps = self.weight[:, :, 0, 0]
        if self.name == "gated_block":
            return gk.gated_block(x, self.weight, self.bias, self.weight2, self.bias, mask, **options)
        if self.name == "conv_out and conv_in":
            planned = gk.plan(mask)
            hidden = gk.conv_out(x, self.weight, self.bias, *planned, padding=1, **options)
            return gk.conv_in(hidden, self.weight2, self.bias, *planned, padding=1, **options)
        if self.name == "gated_linear":
            return gk.gated_linear(x.flatten(2).mT, taps, self.bias, None, mask, **options)
        if self.name == "sliced_conv2d":
            return gk.sliced_conv2d(x, self.weight, self.bias, None, mask.sum(1), padding=1, **options)
        if self.name == "sliced_linear":
            return gk.sliced_linear(x.flatten(2).mT, taps, self.bias, None, mask.sum(1), **options)
        return gk.gated_conv2d(x, self.weight, self.bias, None, mask, padding=1, **options)


NAMES = ("gated_conv2d", "gated_block", "gated_linear", "conv_out and conv_in", "sliced_conv2d", "sliced_linear")


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str, gradients: Callable):
    torch._dynamo.reset()
    model = Served(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x, mask = randn(n, C, 3, 2), draw(n)
        for expected, actual in zip(
            gradients(lambda x, m=mask: model(x, m), [x]), gradients(lambda x, m=mask: compiled(x, m), [x]), strict=True
        ):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_exported_with_any_batch(name: str):
    model, batch = Served(name).eval(), torch.export.Dim("batch")
    example = randn(3, C, 3, 2), draw(3)
    program = torch.export.export(model, example, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    for n in (2, 5):
        given = randn(n, C, 3, 2), draw(n)
        torch.testing.assert_close(program.module()(*given), model(*given))
