"""Models by name."""

import pytest

from gatedkernels.models import GatedResNet, create_model, list_models, register_model


def test_models_by_name():
    assert {"gated_resnet18", "gated_resnet34", "gated_resnet50"} <= set(list_models())
    assert list_models() == sorted(list_models())
    model = create_model("gated_resnet18", num_classes=7, width=0.125)
    assert isinstance(model, GatedResNet) and model.fc.out_features == 7


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name must be one of gated_resnet18, .*got 'resnet18'"):
        create_model("resnet18")


def test_taken_name():
    def gated_resnet18():
        pass

    with pytest.raises(ValueError, match="constructor must have a name of its own, got 'gated_resnet18' again"):
        register_model(gated_resnet18)
