"""Gates in Triton, with the lists that follow from them; like every kernels.py, this knows Triton alone."""

import triton
import triton.language as tl


@triton.jit
def gate_kernel(
    x,  # (samples, height, width, channels), any strides
    weight1,  # (hidden, channels)
    bias1,  # (hidden,)
    weight2,  # (decisions, hidden)
    bias2,  # (decisions,)
    mask,  # bool (samples, decisions), or None
    index,  # int32 (samples, decisions * group): the open channels first, or None
    count,  # int32 (samples,): how many channels are open; with index
    codes,  # int32 (samples,): the number of the largest logit, in place of all that; or None
    arrived,  # int32 (ARRIVED,): filled with zeros, for the convolutions that are gated; or None
    samples,
    pixels,
    width,
    channels,
    hidden,
    decisions,
    group,  # neighbouring channels of one decision
    area,  # what a sum of pixels is divided by: their number, or that of those which were added up before
    x_stride_n,
    x_stride_h,
    x_stride_w,
    x_stride_c,
    SAMPLES: tl.constexpr,  # that one program decides for: they share its weights
    PIXELS: tl.constexpr,  # of a step
    CHANNELS: tl.constexpr,  # at least so many as there are
    HIDDEN: tl.constexpr,  # units of a step
    DECISIONS: tl.constexpr,  # at least so many as there are
    GROUP: tl.constexpr,  # at least so many as there are
    ARRIVED: tl.constexpr,
):
    """One program some samples: pool, two layers, decide, list. Everything is in float32, its sums in one order."""
    program = tl.program_id(0)
    if arrived is not None and program == 0:
        tl.store(arrived + tl.arange(0, ARRIVED), tl.zeros((ARRIVED,), tl.int32))
    sample = program * SAMPLES + tl.arange(0, SAMPLES)
    present = sample < samples
    channel = tl.arange(0, CHANNELS)
    decision = tl.arange(0, DECISIONS)

    of_image = x + sample.to(tl.int64) * x_stride_n
    of_image = of_image[:, None, None] + (channel * x_stride_c)[None, None, :]
    total = tl.zeros((SAMPLES, PIXELS, CHANNELS), tl.float32)
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        at = pixel // width * x_stride_h + pixel % width * x_stride_w
        inside = present[:, None, None] & (pixel < pixels)[None, :, None] & (channel < channels)[None, None, :]
        total += tl.load(of_image + at[None, :, None], inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / area

    logits = tl.zeros((SAMPLES, DECISIONS), tl.float32)
    for first in range(0, hidden, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        known = unit < hidden
        at = weight1 + unit[:, None] * channels + channel[None, :]
        matrix = tl.load(at, known[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
        inner = tl.sum(matrix[None, :, :] * mean[:, None, :], 2)
        inner += tl.load(bias1 + unit, known, other=0.0).to(tl.float32)[None, :]
        inner = tl.maximum(inner, 0.0, propagate_nan=tl.PropagateNan.ALL)
        inner = tl.where(known[None, :], inner, 0.0)  # zeros times infinity are none
        at = weight2 + decision[:, None] * hidden + unit[None, :]
        matrix = tl.load(at, (decision < decisions)[:, None] & known[None, :], other=0.0).to(tl.float32)
        logits += tl.sum(matrix[None, :, :] * inner[:, None, :], 2)
    logits += tl.load(bias2 + decision, decision < decisions, other=0.0).to(tl.float32)[None, :]

    if codes is not None:
        # A NaN counts as infinity, the largest; whatever comes out is one of the table.
        logits = tl.where(logits == logits, logits, float("inf"))
        logits = tl.where((decision < decisions)[None, :], logits, float("-inf"))
        chosen = tl.minimum(tl.argmax(logits, 1), decisions - 1)
        tl.store(codes + sample, chosen, present)
        return
    opened = (logits >= 0.0) & (decision < decisions)[None, :]
    each = present[:, None] & (decision < decisions)[None, :]
    if mask is not None:
        tl.store(mask + sample.to(tl.int64)[:, None] * decisions + decision[None, :], opened, each)
    if index is not None:
        found = opened.to(tl.int32)
        kept = tl.sum(found, 1)
        rank = tl.cumsum(found, 1) - found
        place = tl.where(opened, rank, kept[:, None] + decision[None, :] - rank)
        member = tl.arange(0, GROUP)
        at = (sample.to(tl.int64) * (decisions * group))[:, None, None] + (place * group)[:, :, None]
        value = (decision * group)[None, :, None] + member[None, None, :]
        value = tl.broadcast_to(value, (SAMPLES, DECISIONS, GROUP))
        tl.store(index + at + member[None, None, :], value, each[:, :, None] & (member < group)[None, None, :])
        tl.store(count + sample, kept * group, present)
