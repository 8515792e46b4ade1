"""Which samples share a list: those of similar masks, or those of the same.

On the device, in shapes that do not depend on values, so that a captured graph follows its masks.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gatedkernels.ops.ragged import group_kernels, similar_kernels
from gatedkernels.ops.ragged.configurations import Configuration, Shape
from gatedkernels.ops.ragged.groups_reference import equal_groups_reference
from gatedkernels.ops.ragged.launch import Groups, List, chunk_of, tile_numbers


class Similar(NamedTuple):
    """A plan for groups of similar samples, of which the second launch is still to come: `complete`.

    Attributes:
        groups: Which samples share a list.
        lists: The unions of their masks: counted, and listed by ``complete``.
        shared: Samples of a group.
        samples: Of the batch.
        words: Int32 (samples, words), the masks as bits.
    """

    groups: Groups
    lists: List
    shared: int
    samples: int
    words: Tensor

    def complete(self, shape: Shape, chosen: Configuration) -> Tensor | None:
        """List the unions, and the tiles of the convolution that computes them, if its configuration wants a list.

        Args:
            shape: Of that convolution: its outputs are the listed channels, packed.
            chosen: Its configuration.
        """
        index, count = self.lists[:2]
        assert index is not None and count is not None
        tile, channels, groups = chosen.tile, index.shape[1], len(count)
        tiles = tile_numbers(shape, tile, count.device) if chosen.programs else None
        chunk = min(1024, max(16, triton.next_power_of_2(channels)))
        with torch.cuda.device_of(count):
            similar_kernels.union_kernel[(groups,)](
                self.words, self.groups.order, count, index, tiles, self.samples, channels, self.shared, groups,
                shape.pixels // self.shared, triton.cdiv(shape.pixels, tile.rows), triton.cdiv(channels, tile.channels),
                WORDS=self.words.shape[1], CHUNK=chunk, TILE_ROWS=tile.rows, TILE_CHANNELS=tile.channels,
                TILE_CHUNK=min(chunk_of(groups), similar_kernels.TILE_CHUNK), num_warps=4,
            )  # fmt: skip
        return tiles


def similar(mask: Tensor, shared: int) -> Similar | None:
    """Plan for groups of ``shared`` samples whose masks are alike, in the order of `similar_groups_reference`.

    What differs decides how much is computed, never what comes out. None: the batch, or its masks, are larger than what
    one program orders, or empty.

    Args:
        mask: Bool (N, C).
        shared: Samples of a group; the last one may have fewer.
    """
    samples, channels = mask.shape
    sizes = similar_kernels.sizes(samples, channels, shared)
    if sizes is None:
        return None
    groups = triton.cdiv(samples, shared)

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=mask.device)

    words, keys = integers(samples, sizes["CHANNELS"] // 32), integers(samples, dtype=torch.int64)
    order, index, count = integers(groups * shared), integers(groups, channels), integers(groups)
    with torch.cuda.device_of(mask):
        similar_kernels.order_kernel[(1,)](
            mask, words, keys, order, count, samples, channels, shared, groups, *mask.stride(), **sizes,
            num_warps=similar_kernels.warps(samples, channels), num_stages=1,
        )  # fmt: skip
    return Similar(Groups(order), List(index, count), shared, samples, words)


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
