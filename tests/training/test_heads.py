"""The heads' shapes and parameters."""

import torch

from gatedkernels.nn import set_width
from gatedkernels.training.heads import Expander, SlimmableProjector, two_layers


def test_expander_has_the_papers_parameters():
    expander = Expander(512)
    linear = 512 * 2048 + 2048 * 2048 * 2 + 3 * 2048
    assert sum(parameter.numel() for parameter in expander.parameters()) == linear + 2 * 2 * 2048


def test_expander_maps_features_to_embeddings():
    assert Expander(6, 10)(torch.randn(4, 6)).shape == (4, 10)


def test_a_projector_for_features_of_any_width():
    projector = SlimmableProjector(32, 10, 6)
    for width, features in ((1.0, 32), (0.5, 16)):
        set_width(projector, width)
        assert projector(torch.randn(4, features)).shape == (4, 6)
    weights = 32 * 10 + 10 * 10 + 10 * 6 + 10 + 10 + 6
    assert sum(parameter.numel() for parameter in projector.parameters()) == weights + 2 * 2 * 10


def test_two_layers():
    head = two_layers(6, 10)
    assert head(torch.randn(4, 6)).shape == (4, 6) and head[0].bias is None
