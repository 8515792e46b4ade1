"""Which samples share a list: those of similar masks, or those of the same.

On the device, in shapes that do not depend on values, so that a captured graph follows its masks.
"""

import torch
import triton
from torch import Tensor

from gatedkernels.ops.ragged import group_kernels
from gatedkernels.ops.ragged.groups_reference import equal_groups_reference
from gatedkernels.ops.ragged.launch import Groups

_BITS = 62  # of a signature, which an int64 has room for


def similar_groups(mask: Tensor, shared: int) -> Groups:
    """Groups of ``shared`` samples whose masks are alike, from one ordering of all.

    Samples are ordered by signatures of one bit a channel, those channels first that tell most samples apart (density
    nearest one half), read as a Gray code: neighbours in that order differ in few of the leading bits, and equal masks
    lie side by side. What differs decides how much is computed, never what comes out.

    Args:
        mask: Bool (N, C).
        shared: Samples of a group; the last one may have fewer.
    """
    samples, channels = mask.shape
    spread = (2 * mask.sum(0) - samples).abs()
    telling = spread.argsort(stable=True)[: min(_BITS, channels)]
    # A number read as a Gray code is the running parity of its bits.
    bits = mask[:, telling].long().cumsum(1) % 2
    places = torch.arange(len(telling) - 1, -1, -1, device=mask.device)
    order = (bits << places).sum(1).argsort(stable=True)
    return Groups(torch.nn.functional.pad(order.int(), (0, -samples % shared), value=samples))


def equal_groups(codes: Tensor, count: int, shared: int) -> Groups:
    """Groups of up to ``shared`` samples of one code, whose list is the code's.

    There are as many as there may be at most: every code can leave one group unfilled, and groups that nobody needs
    are empty. Codes outside of the table are taken modulo its length: no memory outside of it is read.

    Args:
        codes: Integers (N,), below ``count``.
        count: Codes that there are.
        shared: Samples of a group.
    """
    samples = len(codes)
    if not 0 < samples <= group_kernels.MOST:
        return Groups(*equal_groups_reference(codes, count, shared))
    groups = samples // shared + min(count, samples)
    order = torch.empty(groups * shared, dtype=torch.int32, device=codes.device)
    lists = torch.empty(groups, dtype=torch.int32, device=codes.device)
    with torch.cuda.device_of(codes):
        group_kernels.equal_groups_kernel[(1,)](
            codes.contiguous(), order, lists, samples, count, shared, groups,
            SAMPLES=triton.next_power_of_2(samples), SHARED=triton.next_power_of_2(shared), num_warps=8,
        )  # fmt: skip
    return Groups(order, lists)
