"""The gradient of the ragged convolution's weights, in Triton. This file knows neither PyTorch nor the package."""

import triton
import triton.language as tl


@triton.jit
def weight_gradient_kernel(
    x,  # (samples, height, width, in_channels), channels dense
    dy,  # (samples, out_height, out_width, out_channels), channels dense
    in_mask,  # bool (samples, in_channels), or None
    out_mask,  # bool (samples, out_channels), or None
    index,  # int32 (blocks, samples): the samples that keep a channel of a block first; None: all
    count,  # int32 (blocks,)
    partial,  # float32 (splits, out_channels, R * S, in_channels)
    samples,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    dy_stride_n,
    dy_stride_h,
    dy_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BY_OUTPUTS: tl.constexpr,  # the blocks of the lists are blocks of outputs; else of inputs
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program some outputs by some inputs of one tap, and a part of the listed samples' pixels.

    Channels keep their places: what differs from sample to sample cannot be added up in registers otherwise. So a
    sample is left out where it keeps none of a block's channels, and its closed channels are zeros where it keeps some.
    """
    blocks_in = tl.cdiv(in_channels, INPUTS)
    block_out = tl.program_id(0) // blocks_in
    block_in = tl.program_id(0) % blocks_in
    tap = tl.program_id(1)
    k = block_out * OUTPUTS + tl.arange(0, OUTPUTS)
    c = block_in * INPUTS + tl.arange(0, INPUTS)
    r = tap // S
    s = tap % S
    pixels = out_height * out_width
    listed = samples
    block = block_out if BY_OUTPUTS else block_in
    if count is not None:
        listed = tl.load(count + block)
    rows = listed * pixels
    # Every program of a split takes the same number of steps: which of them adds what depends on the counts alone.
    share = tl.cdiv(tl.cdiv(rows, ROWS), tl.num_programs(2)) * ROWS
    start = tl.program_id(2) * share
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for first in range(start, tl.minimum(start + share, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        here = row < rows
        sample = row // pixels
        if index is not None:
            sample = tl.load(index + block.to(tl.int64) * samples + sample, here, other=0)
        p = row % pixels // out_width
        q = row % pixels % out_width
        at = dy + sample.to(tl.int64) * dy_stride_n + (p * dy_stride_h + q * dy_stride_w)
        a = tl.load(at[None, :] + k[:, None], here[None, :] & (k < out_channels)[:, None], other=0.0)
        if out_mask is not None:
            at_mask = out_mask + sample.to(tl.int64)[None, :] * out_channels + k[:, None]
            kept = tl.load(at_mask, here[None, :] & (k < out_channels)[:, None], other=0)
            a = tl.where(kept != 0, a, 0.0)
        h = p * STRIDE_H - PADDING_H + r * DILATION_H
        w = q * STRIDE_W - PADDING_W + s * DILATION_W
        inside = here & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = x + sample.to(tl.int64) * x_stride_n + (h * x_stride_h + w * x_stride_w)
        b = tl.load(at[:, None] + c[None, :], inside[:, None] & (c < in_channels)[None, :], other=0.0)
        if in_mask is not None:
            at_mask = in_mask + sample.to(tl.int64)[:, None] * in_channels + c[None, :]
            kept = tl.load(at_mask, inside[:, None] & (c < in_channels)[None, :], other=0)
            b = tl.where(kept != 0, b, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = partial + tl.program_id(2).to(tl.int64) * out_channels * (R * S) * in_channels
    at += ((k * (R * S) + tap) * in_channels)[:, None] + c[None, :]
    tl.store(at, total, (k < out_channels)[:, None] & (c < in_channels)[None, :])
