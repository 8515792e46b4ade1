"""Two sides of an operation, chosen on the device: on a GPU, or interpreted (test_triton.py starts that)."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels import calibration_gpu, policy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("exact_float32"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def draw(samples: int, channels: int, density: float) -> Tensor:
    return torch.rand(samples, channels, device=DEVICE) < density


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.99])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_either_side_computes_the_same(stride: int, density: float, threshold: float):
    from gatedkernels.ops.ragged import switch

    n, c, m, k = 3, 6, 21, 16
    x, mask, out_mask = randn(n, c, 5, 4), draw(n, m, density), draw(n, k, density)
    weights = randn(m, c, 3, 3), randn(m), randn(k, m, 3, 3), randn(k)
    size = [(length - 1) // stride + 1 for length in (5, 4)]
    for residual in (None, randn(n, k, *size)):
        y = switch.gated_block(x, *weights, mask, residual, (stride, stride), threshold)
        exact = gk.gated_block(x, *weights, mask, residual=residual, stride=stride, backend="reference")
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    filters = randn(k, c, 3, 3)
    y = switch.gated_conv2d(x, filters, weights[3], out_mask, (stride, stride), (1, 1), (1, 1), threshold)
    exact = gk.gated_conv2d(x, filters, weights[3], None, out_mask, stride=stride, padding=1, backend="reference")
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("opened", "is_dense"), [(0, False), (12, False), (13, True), (60, True)])
def test_one_side_has_nothing_to_do(opened: int, is_dense: bool):
    """Of 60 channels 12 are 0.2: what is no more than the threshold is gated."""
    from gatedkernels.ops.ragged import launch, switch

    mask = (torch.arange(60, device=DEVICE) < opened).view(3, 20)
    lists = launch.plan(mask)
    found = switch.sides(lists, 20, 16, 0.2)
    gated, dense = (lists.counts.tolist(), [16] * 3), ([20], [16] * 3)
    idle = [0] * 3
    expected = (idle, idle, *dense) if is_dense else (*gated, [0], idle)
    assert [each.tolist() for each in found] == list(expected)


def test_channels_that_are_closed_are_not_read():
    from gatedkernels.ops.ragged import switch

    x, mask = randn(2, 6, 4, 4), draw(2, 16, 0.5)
    weight = torch.where(mask[0, :, None, None, None], randn(16, 6, 3, 3), torch.nan)
    for threshold in (-1.0, 0.99):
        y = switch.gated_conv2d(x, weight, None, mask[:1].expand(2, -1), (1, 1), (1, 1), (1, 1), threshold)
        assert y.isfinite().all()


@pytest.mark.parametrize("kernel", ["gated_block", "conv_out"])
def test_the_operators_follow_the_policy(kernel: str, monkeypatch: pytest.MonkeyPatch):
    n, c = 2, 16
    x, weight, bias, mask = randn(n, c, 4, 4), randn(c, c, 3, 3), randn(c), draw(n, c, 0.5)
    served: list[float] = []

    def run(backend: str, *parameters: Tensor) -> Tensor:
        if kernel == "conv_out":
            return gk.gated_conv2d(x, *parameters, None, mask, padding=1, backend=backend)
        return gk.gated_block(x, *parameters, *parameters, mask, residual=x, backend=backend)

    from gatedkernels.ops.ragged import switch

    name = "gated_conv2d" if kernel == "conv_out" else "gated_block"
    original: Callable = getattr(switch, name)
    monkeypatch.setattr(switch, name, lambda *args: served.append(args[-1]) or original(*args))
    exact = run("reference", weight, bias)
    for threshold in (0.3, 1.0):
        monkeypatch.setattr(policy, "choose", lambda *_: policy.Choice("triton", threshold))  # noqa: B023
        torch.testing.assert_close(run("auto", weight, bias), exact, rtol=1e-4, atol=1e-4)
    assert served == [0.3]
    run("auto", weight.clone().requires_grad_(), bias).sum().backward()
    assert served == [0.3]  # thresholds are of the forward alone


@pytest.mark.parametrize(("kernel", "side"), calibration_gpu.KERNELS)
def test_the_calls_of_a_calibration_compute_the_same(kernel: str, side: int):
    case = calibration_gpu.Case(kernel, side, 16, 2, 4, torch.float32)
    found = calibration_gpu.calls(case, torch.device(DEVICE))
    exact = found["dense"]()
    for name in ("gated 0.5", "switched 0.5"):
        if name in found:
            torch.testing.assert_close(found[name](), exact, rtol=1e-4, atol=1e-4)
    if "other side" in found:
        torch.testing.assert_close(found["other side"](), found["gated 1.0"](), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("density", "threshold"), [(0.0, 0.3), (0.3, -1.0), (0.3, 0.99), (1.0, 0.3)])
def test_either_side_of_a_linear_layer_computes_the_same(density: float, threshold: float):
    n, c, k = 3, 10, 32
    weight, bias, mask = randn(k, c), randn(k), draw(n, k, density)
    for shape in ((n, 5, c), (n, 2, 3, c)):
        x = randn(*shape)
        arguments = x, weight, bias, None, mask, False
        y, exact = (
            torch.ops.gatedkernels.gated_linear.default(*arguments, backend, limit)
            for backend, limit in (("triton", threshold), ("reference", 2.0))
        )
        assert y.shape == exact.shape
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "summed", "group", "threshold"),
    [
        *((False, False, 1, 1.0), (False, False, 1, 0.2), (False, False, 4, 0.8)),
        *((True, False, 4, 0.2), (True, False, 1, 0.8)),
        *((False, True, 1, 0.2), (False, True, 4, 0.8)),
    ],
)
def test_optimised_blocks_follow_the_policy(
    given: bool, summed: bool, group: int, threshold: float, monkeypatch: pytest.MonkeyPatch
):
    """What the gate decides, the result and its sums are the same on either side."""
    from gatedkernels.ops import packed, packed_sums
    from gatedkernels.ops.ragged import optimized, switch

    n, c, hidden = 3, 16, 4
    x = randn(n, c, 5, 6).to(memory_format=torch.channels_last)
    gate = randn(hidden, c), randn(hidden), randn(c // group, hidden), randn(c // group)
    weights = packed.pack_rows(randn(c, c, 3, 3)), randn(c), packed.pack_blocks(randn(c, c, 3, 3)), randn(c)
    run: Callable = switch.run
    served: list[bool] = []
    monkeypatch.setattr(switch, "run", lambda *args: served.append(True) or run(*args))
    monkeypatch.setattr(optimized.policy, "choose", lambda *_: policy.Choice("triton", threshold))
    mask, nothing = draw(n, c // group, 0.5) if given else None, (None, None)
    if summed:
        arguments = x, None, *gate, *weights, *nothing, mask, 1
        own, exact = packed_sums.summed_on_gpu(*arguments), packed_sums._summed(*arguments)
    else:
        arguments = x, *gate, *weights, *nothing, *nothing, mask, 1
        own, exact = ((run(*arguments),) for run in (packed.residual_on_gpu, packed.DEFINITIONS["packed_residual"]))
    assert bool(served) == (0 < threshold < 1)
    for found, expected in zip(own, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
