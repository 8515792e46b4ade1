"""What a mask must look like, and how one decision reaches the channels that share it."""

import torch
from torch import Tensor


def check_mask(name: str, mask: Tensor, batch: int, channels: int, group: int) -> None:
    """Refuse a mask that is not bool of shape (batch, channels / group).

    Args:
        name: The argument's name, for the message.
        mask: The mask to look at.
        batch: Samples in the batch.
        channels: Channels that the mask decides about.
        group: Neighbouring channels that share one decision.

    Raises:
        TypeError: If the mask is not a bool tensor.
        ValueError: If its shape is another one.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != channels // group:
        raise ValueError(f"{name} must have shape ({batch}, {channels // group}), got {tuple(mask.shape)}")


def check_group(name: str, channels: int, group: int) -> None:
    """Refuse a group that is not a positive divisor of the channels.

    Raises:
        ValueError: If it is not, or there are no channels.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    if channels < 1 or channels % group:
        raise ValueError(f"{name} must be a positive multiple of group={group}, got {channels}")


def spread(values: Tensor, group: int) -> Tensor:
    """Repeat each decision for the channels that share it: (N, C / group) to (N, C, 1, 1)."""
    if group != 1:
        values = values.repeat_interleave(group, dim=1)
    return values[..., None, None]
