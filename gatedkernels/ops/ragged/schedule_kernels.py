"""The list of the tiles that a ragged convolution has to compute, in Triton. This file knows nothing else.

Of the tiles that there can be, numbered as ``kernels.place`` has them, some have no listed channel or no sample. The
list holds the others, group by group, those of the longest reductions first: whoever takes every n-th tile of it has as
much to do as everybody else.
"""

import triton
import triton.language as tl


@triton.jit
def extent(
    group,  # numbers of groups, a vector
    groups,
    in_count,
    out_count,
    order,
    lists,
    samples,
    shared,
    pixels,
    channel_tiles,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of these groups the tiles along rows and along channels, and what a tile's reduction is worth."""
    here = group < groups
    its_list = group
    if lists is not None:
        its_list = tl.load(lists + group, here, other=0)
    filled = tl.minimum(shared, samples - group * shared)
    if order is not None:
        filled = tl.zeros(group.shape, tl.int32)
        for place in range(shared):
            filled += (tl.load(order + group * shared + place, here, other=samples) < samples).to(tl.int32)
    rows = tl.where(here, tl.cdiv(filled * pixels, ROWS), 0)
    columns = tl.zeros(group.shape, tl.int32) + channel_tiles
    if out_count is not None:
        columns = tl.cdiv(tl.load(out_count + its_list, here, other=0), CHANNELS)
    worth = tl.zeros(group.shape, tl.int32)
    if in_count is not None:
        worth = tl.load(in_count + its_list, here, other=0)
    return rows, columns, worth


@triton.jit
def schedule_kernel(
    in_count,  # as in ragged_conv_kernel; None also where all reductions are equally long
    out_count,  # None also where the channels that are not listed are written too
    order,
    lists,
    tiles,  # int32 (1 + groups * row_tiles * channel_tiles,): how many tiles there are, then their numbers
    groups,
    samples,
    shared,
    pixels,  # of a sample
    row_tiles,
    channel_tiles,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,  # groups, and then tiles, that one step looks at
):
    """One program a group: find how many tiles come before its own, and write these."""
    group = tl.program_id(0)
    # A vector of one number, so that one function serves this group and all others.
    own_rows, own_columns, own_worth = extent(
        group + tl.arange(0, 1), groups, in_count, out_count, order, lists, samples, shared, pixels, channel_tiles,
        ROWS, CHANNELS,
    )  # fmt: skip
    own = tl.sum(own_rows * own_columns, 0)
    columns = tl.sum(own_columns, 0)
    worth = tl.sum(own_worth, 0)
    before = 0
    total = 0
    for start in range(0, groups, CHUNK):
        other = start + tl.arange(0, CHUNK)
        its_rows, its_columns, its_worth = extent(
            other, groups, in_count, out_count, order, lists, samples, shared, pixels, channel_tiles, ROWS, CHANNELS
        )
        ahead = (its_worth > worth) | ((its_worth == worth) & (other < group))
        before += tl.sum(tl.where(ahead, its_rows * its_columns, 0), 0)
        total += tl.sum(its_rows * its_columns, 0)
    tl.store(tiles, total, mask=group == 0)
    for start in range(0, own, CHUNK):
        number = start + tl.arange(0, CHUNK)
        tile = (group * row_tiles + number // columns) * channel_tiles + number % columns
        tl.store(tiles + 1 + before + number, tile, mask=number < own)
