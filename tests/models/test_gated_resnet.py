"""Gated ResNets: every registered model, and the whole network against its masked dense twin."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import gatedkernels as gk
from gatedkernels.models import GatedResNet, create_model, gated_resnet18, gated_resnet50, list_models

SMALL = {"width": 0.125, "num_classes": 5, "stem": "cifar"}
MODELS = pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("gated_")])


def small(name: str = "gated_resnet18", **options) -> GatedResNet:
    torch.manual_seed(0)
    return create_model(name, **SMALL | options)


@MODELS
def test_shapes_and_backward(name: str):
    model = small(name)
    x = torch.randn(3, 3, 16, 16)
    y, gates = model(x, return_gates=True)
    assert y.shape == (3, 5)
    assert list(gates) == model.gate_keys()
    (y.square().sum() + sum(gate.weight.mean() for gate in gates.values())).backward()
    gated = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert gated == {n for n, _ in model.named_parameters() if ".bn" in n and "_gated." not in n and ".gate" not in n}


@MODELS
def test_dense_branch(name: str):
    model = small(name)
    y, gates = model(torch.randn(3, 3, 16, 16), branch="dense", return_gates=True)
    y.sum().backward()
    assert gates == {}
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {name for name, _ in model.named_parameters() if "gate" in name}


@MODELS
def test_open_gates_with_copied_norms_equal_the_dense_branch(name: str):
    model = small(name).double()
    model(torch.randn(8, 3, 16, 16, dtype=torch.float64), branch="dense")
    gk.models.load_torchvision(model, gk.models.to_torchvision_state_dict(model))
    model.eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    dense, gates = model(x, branch="dense"), model(x, return_gates=True)[1]
    opened = {key: torch.ones_like(gate.mask) for key, gate in gates.items()}
    torch.testing.assert_close(model(x, masks=opened), dense)
    with gk.fix_gates(model, 1.0):
        torch.testing.assert_close(model(x), dense)


@MODELS
def test_saved_and_loaded(name: str):
    model, twin = small(name).eval(), create_model(name, **SMALL).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize(
    ("stem", "size", "dense"),
    [("cifar", 32, 703_560_448), ("imagenet", 96, 333_103_104), ("imagenet", 224, 1_813_561_344)],
)
def test_published_flops(stem: str, size: int, dense: int):
    model, x = gated_resnet18(num_classes=None, stem=stem), torch.randn(1, 3, size, size)
    count = gk.count_flops(model, x)
    assert count.dense == dense
    assert sum(layer.executed for layer in count.per_layer if layer.dense == 0) == 240_640
    assert count.executed < dense
    with gk.fix_gates(model, 1.0):
        assert gk.count_flops(model, x).executed == dense + 240_640
    assert gk.count_flops(model, x, branch="dense").executed == dense


def test_flops_of_brought_masks():
    model, x = small(num_classes=None), torch.randn(2, 3, 16, 16)
    dense = gk.count_flops(model, x).dense
    masks = {key: torch.zeros_like(gate.mask) for key, gate in model(x, return_gates=True)[1].items()}
    closed = gk.count_flops(model, x, masks=masks)
    floor = sum(layer.dense for layer in closed.per_layer if layer.name == "conv1" or "downsample" in layer.name)
    assert closed.executed == floor and closed.dense == dense


def masked_dense(model: GatedResNet, x: Tensor) -> Tensor:
    """The gated branch with every channel computed and gates multiplied in."""
    x = model.maxpool(model.bn1(conv2d(x, model.conv1.weight, None, model.conv1.stride, model.conv1.padding)).relu())
    for block in model.blocks().values():
        shortcut = x if block.downsample is None else block.downsample(x)
        gates = [getattr(block, name) for name in block.gate_names]
        h = x
        for i, (conv, norm) in enumerate(zip(block.convs(), block.norms("gated"), strict=True)):
            source = x if i == 0 else h
            weight = gates[i](source).weight if i < len(gates) else None
            h = norm(conv2d(h, conv.weight, None, conv.stride, conv.padding))
            h = h if weight is None else h.relu() * weight.repeat_interleave(block.group, 1)[..., None, None]
        x = (h + shortcut).relu()
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", ["gated_resnet18", "gated_resnet50"])
def test_gradients_equal_the_masked_dense_network(name: str, group: int):
    model = small(name, group=group).double().train()
    dense = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(7)
    y = model(x)
    y.backward(upstream)
    torch.manual_seed(7)
    expected = masked_dense(dense, z)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, z.grad)
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-9)
        if ".gate" in name and name.endswith("conv2.weight"):
            assert parameter.grad.any()


@MODELS
def test_evaluation_equals_the_masked_dense_network(name: str):
    model = small(name).double()
    model(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    model.eval()
    for n in (0, 1, 3):
        x = torch.randn(n, 3, 13, 15, dtype=torch.float64)
        torch.testing.assert_close(model(x), masked_dense(model, x))


def test_branches_are_separate_and_share_the_rest():
    model, x = small(), torch.randn(4, 3, 16, 16)
    for branch, other in (("dense", "gated"), ("gated", "dense")):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(x, branch=branch)
        moved = {name.rpartition(".")[0] for name, b in model.named_buffers() if not torch.equal(b, before[name])}
        blocks = {name for name in moved if name.startswith("layer") and ".bn" in name and "gate." not in name}
        assert {name.endswith("_gated") for name in blocks} == {branch == "gated"}, other
        assert any("gate.bn" in name for name in moved) == (branch == "gated")
        assert {"bn1", "layer2.0.downsample.1"} <= moved


def test_some_masks_may_be_brought():
    model, x = small("gated_resnet50").eval(), torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    gates = model(x, masks={"layer1.1.gate2": mask}, return_gates=True)[1]
    assert torch.equal(gates["layer1.1.gate2"].mask, mask)
    assert gates["layer1.1.gate1"].mask.any()


def test_stems_and_heads():
    cifar = gated_resnet18(stem="cifar", num_classes=None, width=0.125)
    assert cifar.conv1.kernel_size == (3, 3) and cifar.conv1.padding == (2, 2)
    assert isinstance(cifar.maxpool, nn.Identity) and isinstance(cifar.fc, nn.Identity)
    assert cifar(torch.randn(2, 3, 16, 16)).shape == (2, cifar.num_features) == (2, 64)
    assert gated_resnet18(stem="cifar", stem_padding=1, width=0.125).conv1.padding == (1, 1)
    assert gated_resnet50(width=0.125).num_features == 256
    assert cifar.foldable == (("conv1", "bn1", "relu", "maxpool"),)


@pytest.mark.parametrize("branch", ["gated", "dense"])
def test_compiled(branch: str):
    model, x = small().eval(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, branch=branch), model(x, branch=branch))
        masks = {key: gate.mask for key, gate in model(x, return_gates=True)[1].items()}
        if branch == "gated":
            torch.testing.assert_close(compiled(x, masks=masks), model(x))


def test_compiled_training():
    model = small().train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(4, 3, 16, 16)).sum().backward()
    assert model.layer1[0].gate.conv2.weight.grad.any()


@pytest.mark.parametrize("name", ["gated_resnet18", "gated_resnet50"])
def test_exported_with_a_dynamic_batch(name: str):
    model = small(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}})
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 16, 16)
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "mnist"}, "stem must be one of 'imagenet', 'cifar', got 'mnist'"),
        ({"stem_padding": -1}, "stem_padding must be at least 0, got -1"),
        ({"num_classes": 0}, "num_classes must be positive or None, got 0"),
        ({"width": 0.001}, "width must leave at least one of 64 channels, got 0.001"),
        ({"group": 3}, "out_channels must be a positive multiple of group=3, got 8"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_inputs():
    model, x = small(), torch.randn(2, 3, 16, 16)
    mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="branch must be one of 'gated', 'dense', got 'sparse'"):
        model(x, branch="sparse")
    with pytest.raises(ValueError, match=r"masks must have keys among layer1.0, .*, got layer1.0.gate"):
        model(x, masks={"layer1.0.gate": mask})
    with pytest.raises(ValueError, match='masks must be None in branch "dense"'):
        model(x, branch="dense", masks={"layer1.0": mask})
    for own in (model, gk.optimize(model.eval(), x)):
        with pytest.raises(TypeError, match=r"masks\['layer1\.0'\] must be a bool tensor, got torch\.float32"):
            own(x, masks={"layer1.0": mask.float()})
        with pytest.raises(ValueError, match=r"masks\['layer1\.1'\] must have shape \(2, 8\), got \(2, 7\)"):
            own(x, masks={"layer1.0": mask, "layer1.1": mask[:, 1:]})
