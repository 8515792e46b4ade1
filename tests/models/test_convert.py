"""Gates for torchvision's ResNets."""

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50, resnext50_32x4d, wide_resnet50_2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import gatedkernels as gk
from gatedkernels.nn import Gate, gated_flops, kept_fraction


def cifar(block: type = BasicBlock) -> ResNet:
    """A torchvision ResNet as people make it for small images."""
    model = ResNet(block, [1, 1, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_dense_branch_equals_the_model(block: type):
    model = cifar(block).eval()
    gated = gk.gate(model)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(gated(x, branch="dense"), model(x), rtol=1e-5, atol=1e-5)
    assert not gated.training and gated.fc.weight is not model.fc.weight
    assert gated.conv1.padding == (1, 1)
    keys = [key for key in gated.gate_keys() if key.startswith("layer1")]
    assert keys == (["layer1.0"] if block is BasicBlock else ["layer1.0.gate1", "layer1.0.gate2"])


def test_open_gates_equal_the_model():
    model = cifar().double().eval()
    gated = gk.gate(model, group=8)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with gk.fix_gates(gated, 1.0):
        torch.testing.assert_close(gated(x), model(x))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_gates_start_at_the_budget(block: type, budget: float):
    gated = gk.gate(cifar(block), budget=budget)
    biases = {module.conv2.bias.detach().unique().item() for module in gated.modules() if hasattr(module, "is_gate")}
    (bias,) = biases
    density = torch.tensor(bias, dtype=torch.float64).sigmoid()
    gates = {key: Gate(density > 0, density.expand(1, 4)) for key in gated.gate_keys()}
    costs = gated_flops(gated, torch.zeros(1, 3, 32, 32))
    # The classifier is among the costs here, and was not when the density was chosen.
    assert kept_fraction(costs, gates).item() == pytest.approx(budget, abs=1e-4)


def test_masks_of_a_codebook_start_at_the_budget():
    torch.manual_seed(0)
    gated = gk.gate(cifar(), budget=0.4, codebook=16)
    channels = gk.gate(cifar(), budget=0.4)
    expected = channels.layer1[0].gate.conv2.bias.sigmoid().mean().item()
    opened = torch.cat([block.gate.masks.sigmoid().flatten() for block in gated.blocks().values()]).mean().item()
    assert opened == pytest.approx(expected, abs=0.02)
    assert not gated.layer1[0].gate.conv2.bias.any()


def test_full_budget_opens_nearly_all():
    gated = gk.gate(cifar(), budget=1.0)
    assert gated.layer1[0].gate.conv2.bias.sigmoid().mean().item() == pytest.approx(0.99)


def test_imagenet_stem_head_and_mode():
    model = resnet18()
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(512, 3))
    gated = gk.gate(model, separate_norm=False)
    assert gated.training and isinstance(gated.maxpool, nn.MaxPool2d) and gated.fc[1].out_features == 3
    assert not any("_gated" in name for name in gated.state_dict())


def test_resnet50():
    gated = gk.gate(resnet50(num_classes=4).eval())
    with torch.no_grad():
        assert gated(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize("make", [resnext50_32x4d, wide_resnet50_2, mobilenet_v2, lambda: nn.Linear(2, 2)])
def test_models_without_a_gated_twin(make):
    with pytest.raises(TypeError, match="model must"):
        gk.gate(make())


def test_strange_stem():
    model = resnet18()
    model.maxpool = nn.Identity()
    with pytest.raises(TypeError, match="model must have a 7×7 stem with max-pooling or a 3×3 stem with maxpool"):
        gk.gate(model)


def test_bad_options():
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 0"):
        gk.gate(cifar(), budget=0)
    with pytest.raises(ValueError, match=r"budget must exceed 0\.\d+, what no gate can save, got 0.001"):
        gk.gate(cifar(), budget=0.001)
    with pytest.raises(ValueError, match="out_channels must be a positive multiple of group=3, got 64"):
        gk.gate(cifar(), group=3)
