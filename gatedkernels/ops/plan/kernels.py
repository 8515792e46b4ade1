"""``plan`` in Triton. Like every kernels.py, this knows neither PyTorch nor the rest of the package."""

import triton
import triton.language as tl

CHUNK = 1024  # channels that one step looks at


@triton.jit
def _open(mask, channel, channels, first, samples, shared, stride_n, stride_c):
    """Which of these channels at least one of the ``shared`` samples from ``first`` on keeps, as 0 and 1."""
    found = tl.zeros(channel.shape, tl.int32)
    at = mask + first.to(tl.int64) * stride_n + channel * stride_c
    for _ in range(tl.minimum(shared, samples - first)):
        found |= (tl.load(at, channel < channels, other=0) != 0).to(tl.int32)
        at += stride_n
    return found


@triton.jit
def plan_kernel(
    mask,  # bool (samples, channels), any strides
    index,  # int32 (lists, channels): a permutation, the open channels first
    count,  # int32 (lists,): how many are open
    samples,
    channels,
    shared,  # neighbouring samples that share a list: their union
    stride_n,
    stride_c,
    CHUNK: tl.constexpr,
):
    """One program a list: count the open channels, then give every channel its place."""
    group = tl.program_id(0)
    first = group * shared
    opened = 0
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        opened += tl.sum(_open(mask, channel, channels, first, samples, shared, stride_n, stride_c), 0)
    tl.store(count + group, opened)
    before = 0  # open channels of the chunks before
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        found = _open(mask, channel, channels, first, samples, shared, stride_n, stride_c)
        rank = before + tl.cumsum(found, 0) - found
        place = tl.where(found != 0, rank, opened + channel - rank)
        tl.store(index + group.to(tl.int64) * channels + place, channel, mask=channel < channels)
        before += tl.sum(found, 0)
