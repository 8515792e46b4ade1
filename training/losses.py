"""Self-supervised losses on the embeddings of two views of the same images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_VARIANCE_EPSILON = 1e-4


def invariance_term(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared distance between the two views' embeddings, element by element."""
    return F.mse_loss(first, second)


def variance_term(embeddings: Tensor) -> Tensor:
    """Return how far each dimension's standard deviation stays below one, averaged over dimensions.

    The hinge ``relu(1 - sqrt(var + 1e-4))`` of Bardes et al. (VICReg, 2022), eq. 1 and 2, with the unbiased variance.
    """
    deviation = (embeddings.var(dim=0) + _VARIANCE_EPSILON).sqrt()
    return F.relu(1 - deviation).mean()


def covariance_term(embeddings: Tensor) -> Tensor:
    """Return the squared off-diagonal covariances, summed and divided by the number of dimensions (eq. 3, 4)."""
    num_samples, num_dims = embeddings.shape
    centred = embeddings - embeddings.mean(dim=0)
    covariance = centred.T @ centred / (num_samples - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / num_dims


class VICRegLoss(nn.Module):
    """Variance-invariance-covariance regularisation (Bardes et al., 2022), in float32 whatever the inputs.

    ``invariance * s(a, b) + variance * (v(a) + v(b)) + covariance * (c(a) + c(b))``. The variance terms are summed, not
    averaged, as VICReg-Dual-Gating trains them; constant embeddings therefore cost ``25 * 2 * (1 - 0.01) = 49.5``.
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Compare two views.

        Args:
            first: Embeddings of one view, shape (N, D), N at least 2, any floating type.
            second: Embeddings of the other view, same shape.

        Returns:
            The unweighted terms under "invariance", "variance" and "covariance", and their weighted sum under "loss".
        """
        if first.ndim != 2 or first.shape != second.shape:
            raise ValueError(
                f"first and second must have one shape (N, D), got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        if len(first) < 2:
            raise ValueError(f"first must hold at least 2 samples, got {len(first)}")
        with torch.autocast(first.device.type, enabled=False):
            first, second = first.float(), second.float()
            terms = {
                "invariance": invariance_term(first, second),
                "variance": variance_term(first) + variance_term(second),
                "covariance": covariance_term(first) + covariance_term(second),
            }
            loss = sum((weight * terms[name] for name, weight in self.weights.items()), first.new_zeros(()))
        return {**terms, "loss": loss}

    def extra_repr(self) -> str:
        """Show the weights."""
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())
