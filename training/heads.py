"""Heads that training puts on a backbone and evaluation throws away."""

from torch import Tensor, nn


class Expander(nn.Module):
    """Three linear layers of equal width, batch-normalised and rectified in between (VICReg, 2022, section 4.2).

    Args:
        in_features: Width of the backbone's features.
        out_features: Width of every layer, 2048 in the paper.
    """

    def __init__(self, in_features: int, out_features: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, out_features),
            nn.BatchNorm1d(out_features),
            nn.ReLU(),
            nn.Linear(out_features, out_features),
            nn.BatchNorm1d(out_features),
            nn.ReLU(),
            nn.Linear(out_features, out_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features of shape (N, in_features) to embeddings of shape (N, out_features)."""
        return self.layers(features)
