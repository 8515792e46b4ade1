"""What autograd is told of several operators alike."""

from typing import Any

import torch


def differentiate_once(operator: str, what: str = "gated operations") -> None:
    """Register that an operator, which computes gradients, has none itself: asking for them is a ``RuntimeError``."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{what} can be differentiated once, not twice")

    torch.library.register_autograd(f"gatedkernels::{operator}", refuse)
