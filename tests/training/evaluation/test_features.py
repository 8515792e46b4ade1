"""Features belong to a branch, to evaluation mode, and to their image."""

import pytest
import torch

from gatedkernels.nn import count_flops, fix_gates
from gatedkernels.training.augment import plain_view
from gatedkernels.training.data import Data, load_data
from gatedkernels.training.evaluation import extract, pixel_features
from gatedkernels.training.recipes import backbone_costs, build_backbone, make_config

CONFIG = make_config("vicreg-dual", data="synthetic", image_size=16, width=0.0625)


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("synthetic", image_size=16, limit=20)


@pytest.mark.parametrize("branch", ["gated", "dense"])
def test_features_match_the_branch(data: Data, branch: str):
    backbone, view = build_backbone(CONFIG), plain_view(16, data.mean, data.std)
    features = extract(backbone, data.test, view, branch, backbone_costs(backbone, CONFIG), batch_size=7)
    images = torch.stack([view(data.test[index]) for index in range(20)])
    with torch.no_grad():
        torch.testing.assert_close(features.values, backbone.eval()(images, branch=branch), rtol=1e-4, atol=1e-5)
    assert torch.equal(features.labels, data.test.labels)
    assert (features.kept is None) == (branch == "dense")


def test_kept_is_the_mean_over_images(data: Data):
    backbone, view = build_backbone(CONFIG), plain_view(16, data.mean, data.std)
    costs = backbone_costs(backbone, CONFIG)
    images = torch.stack([view(data.test[index]) for index in range(20)])
    expected = count_flops(backbone, images).kept
    assert extract(backbone, data.test, view, "gated", costs, batch_size=7).kept == pytest.approx(expected, rel=1e-5)
    with fix_gates(backbone, density=0.0):
        closed = extract(backbone, data.test, view, "gated", costs)
    assert closed.kept is not None
    assert closed.kept < 0.2


def test_pixels_are_the_normalised_images(data: Data):
    view = plain_view(16, data.mean, data.std)
    features = pixel_features(data.test, view)
    assert features.values.shape == (20, 3 * 16 * 16)
    assert torch.equal(features.values[3], view(data.test[3]).flatten())
