"""The definition of ``plan`` and of the packed layout, in plain PyTorch."""

import torch
from torch import Tensor


def plan_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index (N, C) int32, active channels first, and count (N,) int32."""
    index = torch.argsort(~mask, dim=1, stable=True)
    return index.to(torch.int32), mask.sum(1, dtype=torch.int32)


def active(index: Tensor, count: Tensor) -> Tensor:
    """Bool (N, C): which positions of a packed tensor hold a channel."""
    return torch.arange(index.shape[1], device=index.device) < count[:, None]


def mask_of(index: Tensor, count: Tensor) -> Tensor:
    """The mask that a plan was made from."""
    return torch.zeros_like(index, dtype=torch.bool).scatter(1, index.long(), active(index, count))


def pack(x: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The active channels of every sample of ``x`` (N, C, H, W) first, zeros after them."""
    packed = x.gather(1, index.long()[:, :, None, None].expand_as(x))
    return torch.where(active(index, count)[:, :, None, None], packed, 0)


def unpack(packed: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The inverse of ``pack``: every channel at its place, zeros in the closed ones."""
    kept = torch.where(active(index, count)[:, :, None, None], packed, 0)
    return torch.zeros_like(kept).scatter(1, index.long()[:, :, None, None].expand_as(kept), kept)
