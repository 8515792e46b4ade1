"""A density compared on the device, in Triton. Like every kernels.py, this knows Triton alone."""

import triton
import triton.language as tl

CHUNK = 1024


@triton.jit
def switch_kernel(
    count,  # int32 (lists,): open channels
    gated_inner,  # int32 (lists,): the same, or zeros
    gated_outer,  # int32 (lists,): ``outer``, or zeros
    dense_inner,  # int32 (1,): zero, or ``inner``
    dense_outer,  # int32 (lists,): zeros, or ``outer``
    lists,
    limit,  # the most channels of all lists with which the gated side serves
    inner,
    outer,
    CHUNK: tl.constexpr,
):
    """One program: what the side that does not serve may compute is nothing."""
    total = 0
    for start in range(0, lists, CHUNK):
        each = start + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(count + each, each < lists, other=0), 0)
    is_dense = total > limit
    for start in range(0, lists, CHUNK):
        each = start + tl.arange(0, CHUNK)
        listed = tl.load(count + each, each < lists, other=0)
        tl.store(gated_inner + each, tl.where(is_dense, 0, listed), each < lists)
        every = tl.zeros_like(listed) + outer
        tl.store(gated_outer + each, tl.where(is_dense, 0, every), each < lists)
        tl.store(dense_outer + each, tl.where(is_dense, every, 0), each < lists)
    tl.store(dense_inner, tl.where(is_dense, inner, 0))
