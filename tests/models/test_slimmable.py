"""Slimmable networks: the papers' multiply-adds and parameters, torchvision's weights, any width from one network."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import gatedkernels as gk
from gatedkernels.models import (
    create_model,
    list_models,
    slimmable_mobilenet_v2,
    slimmable_resnet18,
    slimmable_vit_tiny,
)
from gatedkernels.nn import Slimmable, SwitchableBatchNorm2d, count_flops

NAMES = ("slimmable_resnet18", "slimmable_resnet34", "slimmable_resnet50", "slimmable_mobilenet_v2")
VITS = ("slimmable_vit_tiny", "slimmable_vit_small")

# US3L's slimmable ResNet-18 for CIFAR: width, multiply-adds of convolutions on 32 x 32 pixels and parameters, both in
# millions, without a classifier
US3L_RESNET18 = [
    (1.0, 555.4, 11.169),
    (0.9, 439.8, 9.127),
    (0.8, 347.9, 7.161),
    (0.75, 312.8, 6.285),
    (0.7, 280.2, 5.466),
    (0.6, 207.5, 3.972),
    (0.5, 139.3, 2.795),
    (0.4, 84.8, 1.825),
    (0.3, 60.4, 1.027),
    (0.25, 35.0, 0.700),
]
# Multiply-adds on 224 x 224 pixels, in millions, with the classifier: Yu et al. print 4.1G, 2.3G, 1.1G and 278M for
# S-ResNet-50, and 301M, 209M, 97M and 59M for US-MobileNetV2
IMAGENET = {
    "slimmable_resnet50": [(1.0, 4089), (0.75, 2323), (0.5, 1052), (0.25, 278)],
    "slimmable_mobilenet_v2": [(1.0, 301), (0.75, 209), (0.5, 97), (0.35, 59)],
}
# Parameters of slimmable ResNet-50s with 1000 classes in millions, as US3L's table of transfers has them (its 22.56 at
# full width is a slip: ResNet-50 has 25.56)
RESNET50_PARAMETERS = [(1.0, 25.56), (0.75, 14.77), (0.5, 6.92), (0.25, 1.99)]


def test_every_slimmable_model_is_tested():
    assert {name for name in list_models() if name.startswith("slimmable_")} == {*NAMES, *VITS}


def small(name: str, **options: Any) -> nn.Module:
    """A network that runs on 16 x 16 pixels at once."""
    chosen = {"image_size": 16, "patch_size": 4} if name in VITS else {"stem": "cifar"}
    if "resnet" in name:
        chosen["channels"] = 16
    return create_model(name, **{"num_classes": 5, **chosen, **options})


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("width", "macs", "millions"), US3L_RESNET18)
def test_resnet18_costs_what_the_paper_says(width: float, macs: float, millions: float):
    net = slimmable_resnet18(num_classes=None, stem="cifar")
    example = torch.zeros(1, 3, 32, 32)
    narrow = gk.slice(net, width)
    assert round(count_flops(narrow, example).dense / 1e6, 1) == macs
    assert round(parameters(narrow) / 1e6, 3) == millions
    with gk.width(net, width), torch.no_grad():
        # Batch statistics: nothing is calibrated.
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, gk.nn.make_divisible(512 * width))


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_costs_are_the_published_ones(name: str):
    net = create_model(name)
    for width, millions in IMAGENET[name]:
        narrow = gk.slice(net, width)
        assert round(count_flops(narrow, torch.zeros(1, 3, 224, 224)).dense / 1e6) == millions


def test_resnet50_has_the_published_parameters():
    net = create_model("slimmable_resnet50")
    for width, millions in RESNET50_PARAMETERS:
        assert round(parameters(gk.slice(net, width)) / 1e6, 2) == millions


def test_vit_inputs_only():
    """Blocks cost about w, not w²; the embedding of the patches and the classifier cost what they did."""
    net = slimmable_vit_tiny(num_classes=10).eval()
    example = torch.zeros(1, 3, 224, 224)
    costs = {}
    for width in (1.0, 0.5):
        with gk.width(net, width):
            costs[width] = {layer.name: layer.dense for layer in count_flops(net, example).per_layer}
    for name, cost in costs[1.0].items():
        assert costs[0.5][name] * (2 if name.startswith("blocks") else 1) == cost
    assert net.blocks[0].attn.head_dim == 32 and len(net.blocks) == 12


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
def test_vit_in_full(width: float):
    net = slimmable_vit_tiny(num_classes=10, image_size=32, patch_size=8, slicing="full").eval()
    channels = {0.25: 64, 0.5: 96, 0.75: 160, 1.0: 192}[width]  # whole heads of 32
    narrow = gk.slice(net, width)
    assert narrow.num_features == narrow.head.in_features == channels
    assert narrow.blocks[0].attn.qkv.weight.shape == (3 * channels, channels)
    assert narrow.blocks[0].mlp.fc1.weight.shape == (4 * channels, channels)
    assert narrow.pos_embed.shape == (1, 17, channels) and not narrow.pos_embed.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_weights(name: str):
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, name.removeprefix("slimmable_"))().eval()
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", [*NAMES, *VITS])
def test_slices_compute_the_same(name: str):
    net, images = small(name), torch.randn(8, 3, 16, 16)
    if name not in VITS:
        gk.calibrate_norms(net, [images], [0.5, 1.0])
    else:
        nn.init.normal_(net.head.weight)
    net.eval()
    for width in (0.5, 1.0):
        narrow = gk.slice(net, width)
        assert not any(isinstance(module, Slimmable) for module in narrow.modules())
        with gk.width(net, width), torch.no_grad():
            torch.testing.assert_close(narrow(images), net(images), rtol=1e-4, atol=1e-4)
            assert count_flops(narrow, images).dense == count_flops(net, images).dense
        with pytest.raises(ValueError, match="net must hold slimmable layers"):
            gk.nn.set_width(narrow, width)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", [*NAMES, *VITS])
def test_every_sample_has_its_width(name: str, form: torch.memory_format):
    """One call for a batch of samples of different widths, each as the network of its width computes it."""
    net, images = small(name), torch.randn(6, 3, 16, 16).contiguous(memory_format=form)
    if name not in VITS:
        gk.calibrate_norms(net, [torch.randn(8, 3, 16, 16)], [0.25, 0.5, 1.0])
    else:
        nn.init.normal_(net.head.weight)
    net.eval()
    widths = [0.5, 1.0, 0.25, 0.25, 1.0, 0.5]
    with torch.no_grad():
        for each in (widths, torch.tensor(widths)):
            with gk.width(net, each):
                assert net.width == tuple(widths)
                results = net(images)
            assert net.width == 1.0
            for i, width in enumerate(widths):
                with gk.width(net, width):
                    torch.testing.assert_close(results[i : i + 1], net(images[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_vit_slices_in_full_compute_the_same():
    net, images = small("slimmable_vit_tiny", slicing="full").eval(), torch.randn(2, 3, 16, 16)
    nn.init.normal_(net.head.weight)
    net.set_width(0.5)
    with torch.no_grad():
        torch.testing.assert_close(gk.slice(net, 0.5)(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, *VITS])
def test_a_step_at_every_width_moves_the_first_channels(name: str):
    net, images = small(name), torch.randn(4, 3, 16, 16)
    for width in (1.0, 0.5, 0.3):
        net.set_width(width)
        assert net.width == width
        net(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


def test_compiled_training_makes_few_graphs():
    torch._dynamo.reset()
    net, counter, images = small("slimmable_resnet18"), CompileCounter(), torch.randn(4, 3, 16, 16)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for width in (1.0, 0.25, 0.6, 0.9, 0.45, 0.3, 0.75, 0.8, 1.0):
        with gk.width(net, width):
            torch.testing.assert_close(compiled(images), net(images), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 5


def test_switchable_norms():
    net = small("slimmable_resnet18", norm="switchable", widths=(0.25, 0.5))
    assert net.width == 0.5 and isinstance(net.bn1, SwitchableBatchNorm2d)
    with pytest.raises(ValueError, match=r"width must be one of 0\.25, 0\.5, got 1\.0"):
        net.set_width(1.0)
    images = torch.randn(4, 3, 16, 16)
    net.set_width(0.25)
    net(images)
    assert net.bn1.norms["0_25"].num_batches_tracked == 1 and net.bn1.norms["0_5"].num_batches_tracked == 0
    narrow = gk.slice(net.eval(), 0.25)
    with torch.no_grad():
        torch.testing.assert_close(narrow(images), net(images))
    assert small("slimmable_mobilenet_v2", norm="switchable", widths=(0.5,)).width == 0.5


def test_mobilenet_stems():
    images = torch.randn(2, 3, 32, 32)
    for stem, size in (("imagenet", 1), ("cifar", 4)):
        net = slimmable_mobilenet_v2(num_classes=None, stem=stem)
        assert net.features(images).shape == (2, 1280, size, size)
        assert net(images).shape == (2, 1280)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slimmable_resnet18", {"stem": "tiny"}, "stem must be one of 'imagenet', 'cifar', got 'tiny'"),
        ("slimmable_resnet18", {"stem_padding": -1}, "stem_padding must be at least 0, got -1"),
        ("slimmable_resnet18", {"num_classes": 0}, "num_classes must be positive or None, got 0"),
        ("slimmable_resnet18", {"channels": 0}, "channels must be positive, got 0"),
        ("slimmable_resnet18", {"norm": "group"}, "norm must be one of 'shared', 'switchable', got 'group'"),
        ("slimmable_mobilenet_v2", {"stem": "tiny"}, "stem must be one of"),
        ("slimmable_mobilenet_v2", {"num_classes": -1}, "num_classes must be positive or None, got -1"),
        ("slimmable_vit_tiny", {"slicing": "outputs"}, "slicing must be one of 'inputs', 'full', got 'outputs'"),
        ("slimmable_vit_tiny", {"heads": 5}, "heads must divide dim=192, got 5"),
        ("slimmable_vit_tiny", {"patch_size": 15}, "patch_size must divide image_size=224, got 15"),
        ("slimmable_vit_tiny", {"num_classes": 0}, "num_classes must be positive or None, got 0"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_vit_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, 16, 16\), got \(2, 3, 32, 32\)"):
        small("slimmable_vit_tiny")(torch.zeros(2, 3, 32, 32))


def test_positions_can_be_learned():
    fixed, learned = small("slimmable_vit_tiny"), small("slimmable_vit_tiny", learned_position=True)
    assert learned.pos_embed.requires_grad and not fixed.pos_embed.requires_grad
    assert fixed.pos_embed[0, 0].abs().max() == 0 and len(fixed.pos_embed[0].unique(dim=0)) == 17
