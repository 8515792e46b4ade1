"""``optimize`` of slimmable networks: the network at its width, from the kernels of the gated ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatedkernels as gk
from gatedkernels.models import create_model
from gatedkernels.nn.packed import Packed
from gatedkernels.nn.packed_blocks import PackedBasicBlock, PackedBottleneck

NETS: dict[str, dict[str, Any]] = {
    "slimmable_resnet18": {"stem": "cifar", "channels": 32},
    "slimmable_resnet50": {"stem": "cifar", "channels": 16},
    "slimmable_mobilenet_v2": {"stem": "cifar"},
    "slimmable_vit_tiny": {"image_size": 16, "patch_size": 4},
}
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(name: str) -> nn.Module:
    net = create_model(name, num_classes=5, **NETS[name])
    if "vit" in name:
        nn.init.normal_(net.head.weight)
    else:
        for module in net.modules():
            if isinstance(module, gk.nn.SlimmableBatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        gk.calibrate_norms(net, [IMAGES], [0.5, 1.0])
    return net.eval()


@pytest.mark.parametrize("width", [0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_computes_the_same(name: str, width: float):
    net = build(name)
    with gk.width(net, width), torch.no_grad():
        fast, expected = gk.optimize(net, IMAGES), net(IMAGES)
        for got in (fast(IMAGES), gk.optimize(gk.slice(net, width), IMAGES)(IMAGES)):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fast(IMAGES[:1]), expected[:1], rtol=1e-3, atol=1e-3)
        assert gk.count_flops(fast, IMAGES).dense == gk.count_flops(net, IMAGES).dense
    assert net.width == 1.0
    with torch.no_grad():  # a snapshot: the original goes where it likes
        torch.testing.assert_close(fast(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_residual_blocks_run_on_the_kernels_of_the_gated_ones():
    for name, kind in (("slimmable_resnet18", PackedBasicBlock), ("slimmable_resnet50", PackedBottleneck)):
        fast = gk.optimize(build(name), IMAGES)
        assert all(type(block) is kind for stage in (fast.layer1, fast.layer4) for block in stage)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


def test_mobilenets_fold_every_normalisation():
    fast = gk.optimize(build("slimmable_mobilenet_v2"), IMAGES)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert sum(isinstance(module, Packed) for module in fast.modules()) == 52
    with pytest.raises(RuntimeError, match="evaluation only"):
        fast.train()


def test_a_saved_copy_is_the_same(tmp_path: Path):
    net = build("slimmable_resnet18")
    net.set_width(0.5)
    fast = gk.optimize(net, IMAGES)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    other = build("slimmable_resnet18")
    other.set_width(0.5)
    again = gk.optimize(other, IMAGES)
    again.load_state_dict(torch.load(tmp_path / "fast.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), fast(IMAGES))


def test_a_width_without_statistics():
    net = build("slimmable_resnet18")
    net.set_width(0.75)
    with pytest.raises(ValueError, match=r"width must have statistics, got 0\.75 without"):
        gk.optimize(net, IMAGES)
