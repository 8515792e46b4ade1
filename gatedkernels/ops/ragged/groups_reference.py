"""The definitions of groups, in plain PyTorch: any number of samples, a dozen launches."""

import torch
from torch import Tensor


def equal_groups_reference(codes: Tensor, count: int, shared: int) -> tuple[Tensor, Tensor]:
    """The order and the lists of `gatedkernels.ops.ragged.groups.equal_groups`."""
    samples, device = len(codes), codes.device
    codes = codes.long() % count
    every = torch.arange(count, device=device)
    sizes = (codes[:, None] == every).sum(0)
    needed = -(-sizes // shared)
    ends = needed.cumsum(0)
    sorted_codes, order = codes.sort(stable=True)
    # The place of a sample: its code's first one, and how many samples of that code come before it.
    before = torch.arange(samples, device=device) - (sizes.cumsum(0) - sizes)[sorted_codes]
    places = (ends - needed)[sorted_codes] * shared + before
    groups = samples // shared + min(count, samples)
    filled = torch.full((groups * shared,), samples, dtype=torch.int32, device=device)
    filled.scatter_(0, places, order.int())
    lists = torch.searchsorted(ends, torch.arange(groups, device=device), right=True).clamp_(max=count - 1)
    return filled, lists.int()
