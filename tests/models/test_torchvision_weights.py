"""torchvision's weights, in and out."""

import pytest
import torch
from torchvision.models import resnet18, resnet34, resnet50

from gatedkernels.models import (
    gated_resnet18,
    gated_resnet34,
    gated_resnet50,
    load_torchvision,
    to_torchvision_state_dict,
)

PAIRS = [(resnet18, gated_resnet18), (resnet34, gated_resnet34), (resnet50, gated_resnet50)]


@pytest.mark.parametrize(("dense", "gated"), PAIRS)
def test_round_trip_and_equal_outputs(dense, gated):
    theirs = dense(num_classes=6)
    with torch.no_grad():
        theirs(torch.randn(4, 3, 64, 64))
    theirs.eval()
    model = load_torchvision(gated(num_classes=6), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, branch="dense"), theirs(x), rtol=1e-5, atol=1e-5)
    exported = to_torchvision_state_dict(model)
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in theirs.state_dict().items())
    dense(num_classes=6).load_state_dict(exported)


def test_gated_norms_start_as_copies_and_are_exported_on_demand():
    model = load_torchvision(gated_resnet18(), resnet18().state_dict())
    block = model.layer2[0]
    block.bn1.weight.data.fill_(2.0)
    assert torch.equal(block.bn2.running_var, block.bn2_gated.running_var)
    assert (to_torchvision_state_dict(model)["layer2.0.bn1.weight"] == 2).all()
    gated = to_torchvision_state_dict(model, branch="gated")
    assert (gated["layer2.0.bn1.weight"] == 1).all() and gated.keys() == resnet18().state_dict().keys()


def test_shared_norms_and_no_classifier():
    theirs = resnet18().state_dict()
    model = load_torchvision(gated_resnet18(num_classes=None, separate_norm=False), theirs)
    exported = to_torchvision_state_dict(model, branch="gated")
    assert exported.keys() == {name for name in theirs if not name.startswith("fc.")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cifar"}, r"shapes, \(64, 3, 3, 3\) for conv1.weight, got \(64, 3, 7, 7\): build the model with"),
        ({"num_classes": 10}, r"shapes, \(10,\) for fc.bias, got \(1000,\)"),
    ],
)
def test_nothing_changes_unless_everything_fits(options: dict, message: str):
    model = gated_resnet18(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_torchvision(model, resnet18().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_depth():
    with pytest.raises(ValueError, match=r"state_dict must have the model's names, got a difference in layer1.2.bn1"):
        load_torchvision(gated_resnet18(), resnet34().state_dict())
    with pytest.raises(ValueError, match="branch must be one of 'gated', 'dense', got 'none'"):
        to_torchvision_state_dict(gated_resnet18(width=0.125), branch="none")
