"""The expander's shape and parameters."""

import torch

from gatedkernels.training.heads import Expander


def test_expander_has_the_papers_parameters():
    expander = Expander(512)
    linear = 512 * 2048 + 2048 * 2048 * 2 + 3 * 2048
    assert sum(parameter.numel() for parameter in expander.parameters()) == linear + 2 * 2 * 2048


def test_expander_maps_features_to_embeddings():
    assert Expander(6, 10)(torch.randn(4, 6)).shape == (4, 10)
