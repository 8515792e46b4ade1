"""The gated block where gradients are wanted: what it keeps, which kernels serve it, and what it is registered as."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels import _extension, policy

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))

ops = torch.ops.gatedkernels


def make(n: int, channels: int, hidden: int, size: int) -> list[Tensor]:
    """x, filters and biases, residual."""
    return [
        torch.randn(n, channels, size, size),
        torch.randn(hidden, channels, 3, 3) / (3 * channels**0.5),
        torch.randn(hidden),
        torch.randn(channels, hidden, 3, 3) / (3 * hidden**0.5),
        torch.randn(channels),
        torch.randn(n, channels, size, size),
    ]


def definition(mask: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
        hidden = torch.where(mask[:, :, None, None], conv2d(x, w1, b1, 1, 1).relu(), 0)
        return (conv2d(hidden, w2, b2, 1, 1) + residual).relu()

    return run


def block(mask: Tensor, backend: str = "auto") -> Callable[..., Tensor]:
    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
        return gk.gated_block(x, w1, b1, w2, b2, mask, residual=residual, backend=backend)

    return run


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_both_sides_of_the_threshold(
    density: float, threshold: float, form: str, images, compare, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(policy, "choose", lambda *_, **__: policy.Choice("cpu", threshold))
    mask = torch.rand(3, 20) < density
    tensors = make(3, 9, 20, 6)
    for i in (0, 5):
        tensors[i] = images(tensors[i].shape, form)
    compare(block(mask), definition(mask), tensors, rounding=4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 4), (5,), (0, 3)])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_only_wanted_gradients(wanted: tuple[int, ...], density: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policy, "choose", lambda *_, **__: policy.Choice("cpu", 0.7))
    mask, tensors = torch.rand(2, 20) < density, make(2, 9, 20, 6)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        return torch.autograd.grad(function(*leaves).square().sum(), [leaves[i] for i in wanted])

    for actual, expected in zip(gradients(block(mask)), gradients(definition(mask)), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "gated_block_kept", None)
    mask, tensors = torch.rand(2, 20) < 0.5, make(2, 9, 20, 6)
    block(mask, "cpu")(*tensors)
    with torch.no_grad():
        block(mask, "cpu")(*(t.requires_grad_() for t in tensors))


def test_nan_of_closed_channels_reaches_no_gradient(gradients):
    x, w1, b1, w2, b2, residual = make(2, 9, 20, 6)
    mask = torch.rand(2, 20) < 0.5
    mask[:, 3] = False
    expected = gradients(block(mask, "cpu"), [x, w1, b1, w2, b2, residual])
    b1[3], w1[3], w2[:, 3] = torch.nan, torch.nan, torch.nan
    actual = gradients(block(mask, "cpu"), [x, w1, b1, w2, b2, residual])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# The planes of closed channels are not written: results are compared by the tests above, not by opcheck.
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_registration(grad: bool, n: int):
    x, *weights, residual = (t.requires_grad_(grad) for t in make(n, 4, 6, 5))
    mask = torch.rand(n, 6) < 0.5
    arguments = (x, *weights, mask, residual, (1, 1), 0.8)
    torch.library.opcheck(ops.gated_block_kept.default, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, False, True), (False, True, False)])
def test_registration_of_the_backward(wanted: tuple[bool, ...]):
    x, w1, b1, w2, b2, residual = make(2, 4, 6, 5)
    mask = torch.rand(2, 6) < 0.5
    y, hidden = ops.gated_block_kept(x, w1, b1, w2, b2, mask, residual, (1, 1), 1.0)
    arguments = (torch.randn_like(y), y, x, hidden, w1, w2, mask, (1, 1), list(wanted), 1.0)
    torch.library.opcheck(ops.gated_block_backward.default, arguments, test_utils=UTILITIES)


def test_differentiable_once():
    tensors = [t.requires_grad_() for t in make(2, 4, 6, 5)]
    y = block(torch.ones(2, 6, dtype=torch.bool), "cpu")(*tensors)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_basic_block_with_given_masks_trains_through_it(stride: int, monkeypatch: pytest.MonkeyPatch):
    called = []
    right = ops.gated_block_backward_cpu
    monkeypatch.setattr(ops, "gated_block_backward_cpu", lambda *args: called.append(1) or right(*args))
    layer = gk.nn.GatedBasicBlock(16, 16 * stride, stride).eval()
    x, mask = torch.randn(4, 16, 16, 16), torch.rand(4, 16 * stride) < 0.3
    layer(x, mask=mask).sum().backward()
    assert called
    assert layer.conv1.weight.grad is not None and layer.bn2_gated.weight.grad is not None
    closed = ~mask.any(0)
    assert not layer.conv1.weight.grad[closed].any() and not layer.conv2.weight.grad[:, closed].any()
