"""What a mask must look like, and how one decision reaches the channels that share it."""

import torch
from torch import Tensor

from gatedkernels._checks import check_sizes


def check_mask(name: str, mask: Tensor, x: Tensor, channels: int, group: int) -> None:
    """Refuse a mask that is not bool of shape (N, channels / group).

    Args:
        name: The argument's name, for the message.
        mask: The mask to look at.
        x: The samples that it decides for, shape (N, …).
        channels: Channels that the mask decides about.
        group: Neighbouring channels that share one decision.

    Raises:
        TypeError: If the mask is not a bool tensor.
        ValueError: If its shape is another one, or it is not beside ``x``.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.ndim != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] != channels // group:
        raise ValueError(f"{name} must have shape ({x.shape[0]}, {channels // group}), got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {mask.device}")


def check_group(name: str, channels: int, group: int) -> None:
    """Refuse a group that is not a positive divisor of the channels.

    Raises:
        TypeError: If one of the two is no int.
        ValueError: If it is not, or there are no channels.
    """
    check_sizes(group=group, **{name: channels})
    if channels % group:
        raise ValueError(f"{name} must be a positive multiple of group={group}, got {channels}")


def spread(values: Tensor, group: int) -> Tensor:
    """Repeat each decision for the channels that share it: (N, C / group) to (N, C, 1, 1)."""
    if group != 1:
        values = values.repeat_interleave(group, dim=1)
    return values[..., None, None]
