"""Which samples share a list, in Triton: one program, for batches are small. It knows Triton alone."""

import triton
import triton.language as tl

MOST = 4096  # samples that one program holds


@triton.jit
def equal_groups_kernel(
    codes,  # integers (samples,)
    order,  # int32 (groups * shared,): the sample at every place, ``samples`` at empty ones
    lists,  # int32 (groups,): the code of every group
    samples,
    count,  # of codes
    shared,  # samples of a group
    groups,  # samples // shared + min(count, samples): the most that there may be
    SAMPLES: tl.constexpr,  # at least so many as there are
    SHARED: tl.constexpr,
):
    """Code by code: its samples side by side, from the beginning of a group."""
    sample = tl.arange(0, SAMPLES)
    code = tl.load(codes + sample, sample < samples, other=0) % count
    code = tl.where(code < 0, code + count, code)  # memory outside of the table is nobody's
    first = 0
    for each in range(count):
        own = ((code == each) & (sample < samples)).to(tl.int32)
        size = tl.sum(own, 0)
        needed = (size + shared - 1) // shared
        place = first * shared + tl.cumsum(own, 0) - own
        tl.store(order + place, sample, own != 0)
        empty = size + tl.arange(0, SHARED)
        tl.store(order + first * shared + empty, tl.zeros_like(empty) + samples, empty < needed * shared)
        tl.store(lists + first + sample, tl.zeros_like(sample) + each, sample < needed)
        first += needed
    # Groups that nobody needs are empty, and no more than there are codes or samples.
    tl.store(lists + first + sample, tl.zeros_like(sample) + count - 1, first + sample < groups)
    for start in range(first * shared, groups * shared, SAMPLES):
        tl.store(order + start + sample, tl.zeros_like(sample) + samples, start + sample < groups * shared)
