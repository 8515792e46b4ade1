"""The gated convolution against conv, norm, activation, mask."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels.nn import GatedConv2d


def random_mask(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.5


def by_definition(conv: GatedConv2d, x: Tensor, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
    if in_mask is not None:
        x = x.where(in_mask.repeat_interleave(conv.group, 1)[..., None, None], 0)
    y = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = y if conv.norm is None else conv.norm(y)
    y = y if conv.activation is None else conv.activation(y)
    return y if out_mask is None else y * out_mask.repeat_interleave(conv.group, 1)[..., None, None]


def make(*, norm: str | None = "batch", activation: nn.Module | None = None, **options) -> GatedConv2d:
    norms = {None: None, "batch": nn.BatchNorm2d(16), "group": nn.GroupNorm(4, 16)}
    conv = GatedConv2d(8, 16, 3, padding=1, norm=norms[norm], activation=activation, **options).double()
    if norm == "batch":
        conv.norm.running_mean.normal_()
        conv.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(conv.norm.bias)
    return conv


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [None, "batch", "group"])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Sigmoid()])
def test_brought_masks(training: bool, norm: str | None, activation: nn.Module | None):
    conv = make(norm=norm, activation=activation, gate=False).train(training)
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    for in_mask in (None, random_mask(3, 8)):
        for out_mask in (None, random_mask(3, 16), torch.zeros(3, 16, dtype=torch.bool)):
            y = conv(x, in_mask=in_mask, out_mask=out_mask)
            torch.testing.assert_close(y, by_definition(conv, x, in_mask, out_mask))
            if out_mask is not None:
                assert not y[~out_mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [4, 8], ids=["grouped", "depthwise"])
def test_groups(groups: int, dtype: torch.dtype):
    """No kernel serves them: by policy they run dense, and are as exact."""
    conv, x = make(groups=groups).to(dtype).eval(), torch.randn(3, 8, 5, 7, dtype=dtype)
    in_mask, out_mask = random_mask(3, 8), random_mask(3, 16)
    y, gate = conv(x, in_mask=in_mask, return_gate=True)
    torch.testing.assert_close(y, by_definition(conv, x, in_mask, gate.mask))
    torch.testing.assert_close(conv(x, in_mask=in_mask, out_mask=out_mask), by_definition(conv, x, in_mask, out_mask))


@pytest.mark.parametrize("training", [True, False])
def test_own_gate(training: bool):
    conv = make(activation=nn.ReLU(), bias=False, group=4).train(training)
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    y, gate = conv(x, return_gate=True)
    assert gate.mask.shape == (3, 4)
    torch.testing.assert_close(y, by_definition(conv, x, None, gate.mask))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_gradients_equal_the_masked_dense_ones(norm: str | None):
    conv = make(norm=norm, activation=nn.ReLU())
    dense = copy.deepcopy(conv)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 16, 5, 5, dtype=torch.float64)
    torch.manual_seed(3)
    conv(x).backward(upstream)
    torch.manual_seed(3)
    weight = dense.gate(z).weight
    (by_definition(dense, z, None, None) * weight[..., None, None]).backward(upstream)
    torch.testing.assert_close(x.grad, z.grad)
    for ours, theirs in zip(conv.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert conv.gate.conv2.weight.grad.any()


def test_dense_input_grad_reaches_closed_channels():
    conv = make(norm=None, gate=False)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    conv(x, in_mask=mask).sum().backward()
    assert not x.grad.any()
    conv(x, in_mask=mask, dense_input_grad=True).sum().backward()
    assert x.grad.any()


def test_without_gate_and_masks_it_is_a_convolution():
    conv = GatedConv2d(8, 16, 3, 2, 1, gate=False)
    plain = nn.Conv2d(8, 16, 3, 2, 1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 8, 9, 9)
    y, gate = conv(x, return_gate=True)
    assert gate is None and torch.equal(y, plain(x))


def test_closed_channels_are_not_read():
    conv = make(norm="batch", gate=False).eval()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    x[:, 3] = torch.nan
    in_mask = torch.ones(2, 8, dtype=torch.bool)
    in_mask[:, 3] = False
    assert conv(x, in_mask=in_mask).isfinite().all()


def test_empty_batch():
    conv = GatedConv2d(8, 16, 3, padding=1, norm=nn.BatchNorm2d(16)).eval()
    assert conv(torch.zeros(0, 8, 5, 5)).shape == (0, 16, 5, 5)


def test_flops():
    conv = GatedConv2d(8, 16, 3, stride=2, padding=1).eval()
    x = torch.randn(4, 8, 9, 9)
    count = gk.count_flops(conv, x)
    overhead = 8 * 2 + 2 * 16
    assert count.dense == 9 * 25 * 8 * 16
    assert count.executed == pytest.approx(
        9 * 25 * 8 * conv(x, return_gate=True)[1].mask.sum(1).float().mean() + overhead
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be positive, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be at least 1, got \(3, 0\)"),
        ({"group": 5}, "out_channels must be a positive multiple of group=5, got 16"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GatedConv2d(**{"in_channels": 8, "out_channels": 16, "kernel_size": 3} | arguments)


def test_bad_masks():
    conv, x = make(), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"out_mask must be a bool tensor, got torch.float32"):
        conv(x, out_mask=torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"in_mask must have shape \(2, 8\), got \(2, 16\)"):
        conv(x, in_mask=random_mask(2, 16))
