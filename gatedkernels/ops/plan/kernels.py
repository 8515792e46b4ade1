"""``plan`` in Triton. Like every kernels.py, this knows neither PyTorch nor the rest of the package."""

import triton
import triton.language as tl

CHUNK = 1024  # channels that one step looks at


@triton.jit
def _open(mask, order, channel, channels, first, samples, shared, stride_n, stride_c):
    """Which of these channels at least one of the ``shared`` samples at ``first`` and behind keeps, as 0 and 1."""
    found = tl.zeros(channel.shape, tl.int32)
    for place in range(first, tl.minimum(first + shared, samples)):
        sample = place
        if order is not None:
            sample = tl.load(order + place)
        at = mask + sample.to(tl.int64) * stride_n + channel * stride_c
        found |= (tl.load(at, channel < channels, other=0) != 0).to(tl.int32)
    return found


@triton.jit
def plan_kernel(
    mask,  # bool (samples, channels), any strides
    order,  # int32 (samples,) and more: in which order they are grouped; None: as they are
    index,  # int32 (lists, channels): a permutation, the open channels first
    count,  # int32 (lists,): how many are open
    arrived,  # int32 (ARRIVED,): filled with zeros, for the convolutions that the lists are for
    samples,
    channels,
    shared,  # neighbouring samples that share a list: their union
    stride_n,
    stride_c,
    CHUNK: tl.constexpr,
    ARRIVED: tl.constexpr,
):
    """One program a list: count the open channels, then give every channel its place."""
    group = tl.program_id(0)
    if group == 0:
        tl.store(arrived + tl.arange(0, ARRIVED), tl.zeros((ARRIVED,), tl.int32))
    first = group * shared
    opened = 0
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        opened += tl.sum(_open(mask, order, channel, channels, first, samples, shared, stride_n, stride_c), 0)
    tl.store(count + group, opened)
    before = 0  # open channels of the chunks before
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        found = _open(mask, order, channel, channels, first, samples, shared, stride_n, stride_c)
        rank = before + tl.cumsum(found, 0) - found
        place = tl.where(found != 0, rank, opened + channel - rank)
        tl.store(index + group.to(tl.int64) * channels + place, channel, mask=channel < channels)
        before += tl.sum(found, 0)
