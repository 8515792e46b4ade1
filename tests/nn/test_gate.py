"""The channel gate against its definition."""

import pytest
import torch
from torch import Tensor, nn

from gatedkernels.nn import ChannelGate, Gate, gate_key


def logits_by_definition(gate: ChannelGate, x: Tensor) -> Tensor:
    """Pool, convolve, normalise, ReLU, convolve; in evaluation."""
    hidden = x.mean((2, 3)) @ gate.conv1.weight.flatten(1).T
    scale = gate.bn.weight / (gate.bn.running_var + gate.bn.eps).sqrt()
    hidden = ((hidden - gate.bn.running_mean) * scale + gate.bn.bias).relu()
    logits = hidden @ gate.conv2.weight.flatten(1).T
    return logits if gate.conv2.bias is None else logits + gate.conv2.bias


@pytest.mark.parametrize("bias_init", [None, 0.3])
@pytest.mark.parametrize("group", [1, 8, 16, 32, 64])
def test_evaluation_is_a_threshold_on_the_logits(group: int, bias_init: float | None):
    gate = ChannelGate(12, 64, group=group, bias_init=bias_init).double().eval()
    x = torch.randn(5, 12, 3, 4, dtype=torch.float64)
    mask, weight = gate(x)
    torch.testing.assert_close(gate.logits(x), logits_by_definition(gate, x))
    assert mask.dtype == torch.bool and mask.shape == (5, 64 // group)
    assert torch.equal(mask, logits_by_definition(gate, x) >= 0)
    assert torch.equal(weight, mask.double()) and not weight.requires_grad


def test_training_opens_with_the_probability_of_the_logit(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    gate = ChannelGate(4, 6)
    logits = torch.tensor([[-3.0, -1.0, -0.1, 0.0, 0.5, 2.0]])
    monkeypatch.setattr(gate, "logits", lambda x: logits.expand(100_000, 6))
    mask, weight = gate(torch.zeros(1, 4, 1, 1))
    assert torch.equal(weight, mask.float())
    torch.testing.assert_close(mask.double().mean(0), logits[0].double().sigmoid(), atol=6e-3, rtol=0)


def test_training_gradient_is_the_slope_at_the_noisy_logit(monkeypatch: pytest.MonkeyPatch):
    gate = ChannelGate(4, 6, temperature=0.5).double()
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(gate, "logits", lambda x: logits)
    torch.manual_seed(1)
    gate(torch.zeros(1, 4, 1, 1, dtype=torch.float64)).weight.sum().backward()
    torch.manual_seed(1)
    uniform = torch.rand(3, 6)
    soft = torch.sigmoid((logits.detach() + (uniform + 1e-8).log() - (1 - uniform + 1e-8).log()) / 0.5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 0.5)


def test_every_parameter_learns():
    gate = ChannelGate(8, 16, bias_init=1.0)
    (gate(torch.randn(4, 8, 3, 3)).weight * torch.randn(4, 16)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gate.parameters())


def test_parts():
    gate = ChannelGate(64, 128)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "conv1.weight": (16, 64, 1, 1),
        "bn.weight": (16,),
        "bn.bias": (16,),
        "conv2.weight": (128, 16, 1, 1),
    }
    assert gate.temperature == pytest.approx(2 / 3)
    assert isinstance(gate.bn, nn.BatchNorm2d)
    assert torch.equal(ChannelGate(64, 128, bias_init=2.0).conv2.bias, torch.full((128,), 2.0))
    assert ChannelGate(2, 4).conv1.out_channels == 1
    assert gate.conv2.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_weight_is_float32_under_autocast(training: bool):
    gate = ChannelGate(8, 16).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask, weight = gate(torch.randn(4, 8, 3, 3))
    assert weight.dtype == torch.float32 and torch.equal(weight > 0, mask)


def test_empty_batch():
    mask, weight = ChannelGate(8, 16).eval()(torch.zeros(0, 8, 3, 3))
    assert mask.shape == weight.shape == (0, 16)


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool):
    gate = ChannelGate(8, 16).train(training)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 3, 3)
    mask, weight = compiled(x)
    assert torch.equal(weight > 0, mask)
    if training:
        weight.sum().backward()
        assert gate.conv2.weight.grad.any()
    else:
        assert torch.equal(mask, gate(x).mask)


def test_keys():
    assert [gate_key(name) for name in ("layer1.0.gate", "layer1.0.gate2", "gate")] == [
        "layer1.0",
        "layer1.0.gate2",
        "gate",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 30, "group": 8}, "out_channels must be a positive multiple of group=8, got 30"),
        ({"out_channels": -8}, "out_channels must be positive, got -8"),
        ({"in_channels": 0}, "in_channels must be positive, got 0"),
        ({"group": 0}, "group must be positive, got 0"),
        ({"reduction": 0}, "reduction must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ChannelGate(**{"in_channels": 8, "out_channels": 16} | arguments)


def test_bad_inputs():
    gate = ChannelGate(8, 16)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 8, H, W\), got \(4, 7, 3, 3\)"):
        gate(torch.zeros(4, 7, 3, 3))
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        Gate.fixed("mask", torch.zeros(2, 4), torch.ones(2, 4), 4, 1)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got list"):
        Gate.fixed("mask", [True], torch.ones(2, 4), 4, 1)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\), got \(2, 8\)"):
        Gate.fixed("mask", torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8), 8, 2)
