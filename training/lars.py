"""Layer-wise adaptive rate scaling on top of SGD with momentum."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_EPSILON = 1e-8


class LARS(torch.optim.SGD):
    """SGD whose step on each weight is bounded by a fraction of the weight's norm (You et al., 2017).

    For every parameter that is not one-dimensional, with gradient g, weight p and decay wd of its group::

        q = trust * |p| / (|g| + wd * |p| + 1e-8)
        q = min(q / lr, 1)
        g <- q * (g + wd * p)

    followed by plain SGD with momentum: the local learning rate is min(trust * |p| / (|g| + wd * |p|), lr).
    One-dimensional parameters (biases, normalisation) take plain SGD steps without decay. So does a weight that is all
    zero, which the formula would freeze.

    Args:
        params: Parameters or groups of them; a group may set its own ``lr`` and ``weight_decay``.
        lr: Upper bound of every local learning rate.
        momentum: Share of the previous step that is kept.
        weight_decay: Added to the gradient inside the scaling; 0 for a group means scaled but not decayed.
        trust: Step length as a fraction of the weight's norm, the paper's eta.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.02,
    ) -> None:
        if trust <= 0:
            raise ValueError(f"trust must be positive, got {trust}")
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("trust", trust)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Scale the gradients in place, then take one step of SGD."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim != 1:
                    _scale(parameter, group)
            group["weight_decay"] = 0.0  # already inside the gradients
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss


def _scale(parameter: Tensor, group: dict[str, Any]) -> None:
    """Replace the gradient g by q * (g + decay * p)."""
    gradient, decay, lr = parameter.grad, group["weight_decay"], group["lr"]
    assert gradient is not None
    norm, gradient_norm = parameter.norm(), gradient.norm()
    gradient.add_(parameter, alpha=decay)
    scale = group["trust"] * norm / (gradient_norm + decay * norm + _EPSILON)
    scale = (scale / lr).clamp(max=1.0) if lr > 0 else torch.ones_like(scale)
    gradient.mul_(torch.where(norm > 0, scale, 1.0))
