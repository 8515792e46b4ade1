"""The definitions of groups, in plain PyTorch: any number of samples, a dozen launches."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gatedkernels.ops.plan.reference import plan_reference

BITS = 50  # channels of a signature
WORD = 32  # neighbouring channels that are looked at together


def similar_groups_reference(mask: Tensor, shared: int) -> Tensor:
    """The order of `gatedkernels.ops.ragged.groups.similar`, ``samples`` at the empty places of the last group.

    Samples are ordered by signatures of one bit a channel, those channels first that tell most samples apart (density
    nearest one half), read as a Gray code: neighbours in that order differ in few of the leading bits, and samples of
    equal masks have equal signatures. Samples of one signature keep their order. Channels that say what their left
    neighbour says, as those of one decision do, come last: one of them tells all.
    """
    samples, channels = mask.shape
    spread = (2 * mask.sum(0) - samples).abs()
    repeats = pad((mask[:, 1:] == mask[:, :-1]).all(0), (1, 0))[:channels]
    repeats &= torch.arange(channels, device=mask.device) % WORD != 0
    spread += (samples + 1) * repeats
    telling = spread.argsort(stable=True)[: min(BITS, channels)]
    # A number read as a Gray code is the running parity of its bits.
    bits = mask[:, telling].long().cumsum(1) % 2
    places = torch.arange(len(telling) - 1, -1, -1, device=mask.device)
    order = (bits << places).sum(1).argsort(stable=True)
    return pad(order.int(), (0, -samples % shared), value=samples)


def union_reference(mask: Tensor, order: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """The plan of what any sample of a group keeps: index (groups, C) and count (groups,)."""
    with_nobody = torch.cat([mask, mask.new_zeros((1, mask.shape[1]))])  # whom empty places hold
    return plan_reference(with_nobody[order.long()].view(-1, shared, mask.shape[1]).any(1))


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
