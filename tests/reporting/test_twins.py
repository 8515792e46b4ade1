"""Plain PyTorch twins compute what the gated modules compute."""

import pytest
import torch
from torch import nn

from gatedkernels import fix_gates, optimize
from gatedkernels.reporting.twins import FoldedConv2d, PrepackedConv2d, build_twin, prepack


@pytest.fixture(params=["original", "optimised"])
def source(request: pytest.FixtureRequest, gated):
    """Where a twin is built from."""
    module, x = gated
    return (module, x) if request.param == "original" else (optimize(module, x), x)


@torch.no_grad()
def test_dense_twin_is_the_module_with_all_gates_open(gated, source):
    module, x = gated
    with fix_gates(module, 1.0):
        want = module(x)
    torch.testing.assert_close(build_twin(source[0])(x), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gated_twin_decides_and_masks(gated, source):
    module, x = gated
    twin = build_twin(source[0], gated=True)
    torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)
    with fix_gates(module, 0.5), fix_gates(twin, 0.5):
        torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prepacked_twin_is_the_dense_one(gated):
    module, x = gated
    twin = build_twin(module)
    packed = prepack(twin)
    assert any(isinstance(part, PrepackedConv2d) for part in packed.modules())
    assert not any(isinstance(part, PrepackedConv2d) for part in twin.modules())
    for images in (x, x[:1], torch.randn(2, x.shape[1], 12, 12)):
        last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(packed(last), twin(images), rtol=1e-4, atol=1e-4)


def test_twins_share_nothing_with_the_module(build):
    module, x = build("basic")
    twin = build_twin(module, gated=True)
    want = twin(x)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(x), want)
    assert not any(parameter.requires_grad for name, parameter in twin.named_parameters() if "gate" not in name)


def test_names_are_the_originals(build):
    module, _ = build("resnet18")
    names = {name for name, _ in build_twin(module, gated=True).named_modules()}
    assert {"conv1", *module.blocks(), "layer1.0.gate", "fc"} <= names
    assert not any("gate" in name for name, _ in build_twin(module).named_modules())


def test_errors():
    with pytest.raises(TypeError, match="model must be a GatedResNet, a gated block or a GatedConv2d, got Linear"):
        build_twin(nn.Linear(2, 2))


def test_prepacking_needs_float32_or_bfloat16_on_the_cpu(build):
    module, _ = build("basic")
    with pytest.raises(RuntimeError, match="prepacked convolutions need float32 or bfloat16 on the CPU"):
        prepack(build_twin(module).to(torch.float16))


def test_folded_convolution_adds_and_clips():
    shape = build_shape()
    conv = FoldedConv2d(shape, torch.ones(1, 1, 1, 1), torch.tensor([-1.0]), relu=True)
    x = torch.tensor([[[[0.5, 3.0]]]])
    assert conv(x).flatten().tolist() == [0.0, 2.0]
    assert conv(x, torch.full_like(x, 1.0)).flatten().tolist() == [0.5, 3.0]


def build_shape():
    from gatedkernels.nn.costs import ConvShape

    return ConvShape(1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1)
