"""Heads that training puts on a backbone and evaluation throws away."""

from torch import Tensor, nn

from gatedkernels.nn import SlimmableLinear
from gatedkernels.training.config import US3LConfig


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


class SlimmableProjector(nn.Module):
    """Three linear layers, batch-normalised and rectified in between; the first reads as many features as there are.

    Only its inputs narrow with the width, where the features do; everything else serves all widths (US3L, 2023).

    Args:
        in_features: Width of the backbone's features at full width.
        hidden: Width of the hidden layers.
        out_features: Width of the embeddings.
        narrows: Whether the features narrow with the width.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, *, narrows: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            SlimmableLinear(in_features, hidden, slice_in=narrows, slice_out=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features of the present width to embeddings of shape (N, out_features)."""
        return self.layers(features)


def projector(backbone: nn.Module, config: US3LConfig) -> SlimmableProjector:
    """Build the head that belongs to a slimmable backbone in a run."""
    features, narrows = int(backbone.num_features), bool(backbone.features_narrow)  # type: ignore[arg-type]
    return SlimmableProjector(features, config.hidden, config.embedding, narrows=narrows)


def two_layers(features: int, hidden: int) -> nn.Sequential:
    """Build a predictor or distillation head: linear without bias, batch normalisation, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, features)
    )
