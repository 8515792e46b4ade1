"""A plan for groups of samples whose masks are alike, in two launches of Triton. This file knows nothing else.

The first is one program: it packs masks into bits, orders samples by similarity, and counts the union of every group.
The second has a program a group: it lists the union, and the tiles that the group has to compute.
"""

import triton
import triton.language as tl

from gatedkernels.ops.ragged import schedule_kernels

BITS = tl.constexpr(50)  # channels of a signature
NUMBERS = tl.constexpr(4096)  # a sample's number lies below its signature, so that no two keys are equal
LANES = tl.constexpr(64)  # the next power of two above BITS
WORD = tl.constexpr(32)  # channels of a word
# What one program holds.
MOST_SAMPLES, MOST_CHANNELS = 1024, 2048
AT_ONCE = 1024  # bits that a warp looks at in one step
FEW = 8192  # bits for which four warps are enough
TILE_CHUNK = 256  # groups that one step of the list of tiles looks at


def sizes(samples: int, channels: int, shared: int) -> dict[str, int] | None:
    """What ``order_kernel`` is specialised by; None where one program has no room, or nothing to do."""
    if not 0 < samples <= MOST_SAMPLES or not 0 < channels <= MOST_CHANNELS:
        return None
    at_once = AT_ONCE * warps(samples, channels)
    rows, width = triton.next_power_of_2(samples), max(triton.next_power_of_2(channels), LANES.value)
    return {
        "SAMPLES": rows,
        "CHANNELS": width,
        "SHARED": triton.next_power_of_2(shared),
        "PACKED": min(rows, at_once // width),
        "SIGNED": min(rows, at_once // 2 // LANES.value),  # their sums are of 64 bits
        "UNITED": min(triton.next_power_of_2(triton.cdiv(samples, shared)), at_once * WORD.value // width),
    }


def warps(samples: int, channels: int) -> int:
    """Of ``order_kernel``."""
    return 4 if samples * channels <= FEW else 8


@triton.jit
def bits_set(word):
    """How many bits of each 32-bit number are set."""
    word = word.to(tl.uint32)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def either(one, other):
    """The bits of both."""
    return one | other


@triton.jit
def pack_bits(mask, words, samples, channels, stride_n, stride_c, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Pack the masks of all samples; return how many samples keep each channel, and whether any tells it from its left.

    The first channel of a word has no left neighbour.
    """
    channel = tl.arange(0, CHANNELS)
    word = tl.arange(0, CHANNELS // WORD)
    kept = tl.zeros((CHANNELS,), tl.int32)
    differing = tl.zeros((CHANNELS // WORD,), tl.int32) + 1
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        at = mask + sample.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_c
        found = tl.load(at, (sample < samples)[:, None] & (channel < channels)[None, :], other=0) != 0
        kept += tl.sum(found.to(tl.int32), 0)
        bits = tl.reshape(found.to(tl.uint32), (ROWS, CHANNELS // WORD, WORD)) << tl.arange(0, WORD)[None, None, :]
        at = words + sample[:, None] * (CHANNELS // WORD) + word[None, :]
        packed = tl.sum(bits, 2).to(tl.int32, bitcast=True)
        tl.store(at, packed, (sample < samples)[:, None])
        differing |= tl.reduce(packed ^ (packed << 1), 0, either)
    differs = (differing[:, None] >> tl.arange(0, WORD)[None, :]) & 1
    return kept, tl.reshape(differs, (CHANNELS,))


@triton.jit
def order_kernel(
    mask,  # bool (samples, channels), any strides
    words,  # int32 (samples, CHANNELS / 32): the masks, a bit a channel
    keys,  # int64 (samples,): signatures, and below them the samples' numbers
    order,  # int32 (groups * shared,): the sample at every place, ``samples`` at empty ones
    count,  # int32 (groups,): how many channels the union of a group has
    samples,
    channels,
    shared,  # samples of a group
    groups,
    stride_n,
    stride_c,
    SAMPLES: tl.constexpr,  # powers of two, no less than what there are
    CHANNELS: tl.constexpr,  # and than LANES
    SHARED: tl.constexpr,
    PACKED: tl.constexpr,  # samples that one step packs
    SIGNED: tl.constexpr,  # samples that one step signs
    UNITED: tl.constexpr,  # groups that one step unites
):
    """One program: the order of samples by signatures of those channels that tell most of them apart."""
    kept, differs = pack_bits(mask, words, samples, channels, stride_n, stride_c, CHANNELS, PACKED)
    # The channels nearest to one half come first, those of equal spread as they are, and repetitions of others last.
    channel = tl.arange(0, CHANNELS)
    spread = (tl.abs(2 * kept - samples) + tl.where(differs != 0, 0, samples + 1)) * CHANNELS + channel
    spread = tl.sort(tl.where(channel < channels, spread, 0x7FFFFFFF))
    row = tl.arange(0, CHANNELS // LANES)[:, None]
    telling = tl.sum(tl.where(row == 0, tl.reshape(spread, (CHANNELS // LANES, LANES)), 0), 0) % CHANNELS
    place = tl.arange(0, LANES)
    used = place < tl.minimum(BITS, channels)
    tl.debug_barrier()  # the words are there
    for start in range(0, samples, SIGNED):
        sample = start + tl.arange(0, SIGNED)
        here = (sample < samples)[:, None] & used[None, :]
        at = words + sample[:, None] * (CHANNELS // WORD) + (telling // WORD)[None, :]
        bit = (tl.load(at, here, other=0) >> (telling % WORD)[None, :]) & 1
        # A number read as a Gray code is the running parity of its bits.
        parity = (tl.cumsum(bit, 1) & 1).to(tl.int64)
        signature = tl.sum(tl.where(used[None, :], parity << tl.maximum(BITS - 1 - place, 0)[None, :], 0), 1)
        tl.store(keys + sample, signature * NUMBERS + sample, sample < samples)
    tl.debug_barrier()  # the keys are there
    place = tl.arange(0, SAMPLES)
    ordered = tl.sort(tl.load(keys + place, place < samples, other=0x7FFFFFFFFFFFFFFF))
    tl.store(order + place, (ordered % NUMBERS).to(tl.int32), place < samples)
    empty = samples + tl.arange(0, SHARED)
    tl.store(order + empty, tl.zeros_like(empty) + samples, empty < groups * shared)
    tl.debug_barrier()  # the order is there
    word = tl.arange(0, CHANNELS // WORD)
    for start in range(0, groups, UNITED):
        group = start + tl.arange(0, UNITED)
        union = tl.zeros((UNITED, CHANNELS // WORD), tl.int32)
        for other in range(shared):
            sample = tl.load(order + group * shared + other, group < groups, other=samples)
            at = words + sample[:, None] * (CHANNELS // WORD) + word[None, :]
            union |= tl.load(at, (sample < samples)[:, None], other=0)
        tl.store(count + group, tl.sum(bits_set(union), 1), group < groups)


@triton.jit
def union_kernel(
    words,  # as order_kernel left them
    order,
    count,
    index,  # int32 (groups, channels): a permutation, the channels of the union first
    tiles,  # int32: see schedule_kernel; None: nobody wants them
    samples,
    channels,
    shared,
    groups,
    pixels,  # of a sample; this and what follows: of the convolution that the tiles are for
    row_tiles,
    channel_tiles,
    WORDS: tl.constexpr,  # of a sample
    CHUNK: tl.constexpr,  # channels that one step looks at
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    TILE_CHUNK: tl.constexpr,
):
    """One program a group: give every channel its place, and write the tiles of the group."""
    group = tl.program_id(0)
    opened = tl.load(count + group)
    before = 0  # open channels of the chunks before
    for start in range(0, channels, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        union = tl.zeros((CHUNK,), tl.int32)
        for place in range(shared):
            sample = tl.load(order + group * shared + place)
            if sample < samples:
                union |= tl.load(words + sample * WORDS + channel // WORD, channel < channels, other=0)
        found = (union >> (channel % WORD)) & 1
        rank = before + tl.cumsum(found, 0) - found
        at = tl.where(found != 0, rank, opened + channel - rank)
        tl.store(index + group.to(tl.int64) * channels + at, channel, mask=channel < channels)
        before += tl.sum(found, 0)
    if tiles is not None:
        schedule_kernels.schedule_kernel(
            None, count, order, None, tiles, groups, samples, shared, pixels, row_tiles, channel_tiles,
            TILE_ROWS, TILE_CHANNELS, TILE_CHUNK,
        )  # fmt: skip
