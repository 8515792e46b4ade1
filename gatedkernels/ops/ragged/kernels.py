"""The ragged convolution and what packs its input, in Triton. This file knows neither PyTorch nor the package.

A *list* says which channels count for a group of neighbouring samples: ``index`` (lists, channels), the channels that
count first, and ``count`` (lists,). Without an index the list is 0, 1, 2, …: a width; without a count it is whole.
Either side of a convolution has one. What is gathered is rows of weights, never activations; launches depend on shapes
alone. Either there is a program for every tile that there can be, and those for which a list is too short end at once;
or a few programs share a list of the tiles that there are.
"""

import triton
import triton.language as tl

# So many neighbouring pixels of a sample are added up for a gate that reads the result.
SLOT = tl.constexpr(16)
# A packed tensor holds zeros from count to the next multiple of this, so that loads may be as wide as that.
STEP = tl.constexpr(16)


@triton.jit
def rounded(count):
    """So many channels of a packed tensor may be read."""
    return (count + STEP - 1) // STEP * STEP


@triton.jit
def place(tile, row_tiles, channel_tiles, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The group of samples, the rows and the positions in the list of outputs that a tile has.

    Tiles of one group are neighbours, those of the same rows first: they share what they read.
    """
    group = tile // (row_tiles * channel_tiles)
    rest = tile % (row_tiles * channel_tiles)
    row = rest // channel_tiles * ROWS + tl.arange(0, ROWS)
    first = rest % channel_tiles * CHANNELS
    return group, row, first


@triton.jit
def length(count, its_list, channels):
    """How many channels a list has."""
    listed = channels
    if count is not None:
        listed = tl.load(count + its_list)
    return listed


@triton.jit
def convolve_tile(
    tile,
    split,  # which part of the reduction
    tensors,
    sides,
    sizes,
    strides,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPREAD_H: tl.constexpr,
    SPREAD_W: tl.constexpr,
    MIRRORED: tl.constexpr,
    RELU: tl.constexpr,
    PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of pixels by listed output channels: reduce over taps and listed input channels, then finish.

    Of the programs that reduce parts of a tile, whoever comes last adds up all parts, always in the same order.
    """
    x, weight, bias, residual, gate, y, sums, partial, arrived = tensors
    in_index, in_count, out_index, out_count, order, lists = sides
    samples, shared, height, width, in_channels, out_height, out_width, out_channels = sizes
    x_stride_n, x_stride_h, x_stride_w, weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s = strides[:7]
    y_stride_n, y_stride_h, y_stride_w = strides[7:]
    pixels = out_height * out_width
    row_tiles = tl.cdiv(shared * pixels, ROWS)
    channel_tiles = tl.cdiv(out_channels, CHANNELS)
    group, row, first = place(tile, row_tiles, channel_tiles, ROWS, CHANNELS)
    its_list = group
    if lists is not None:
        its_list = tl.load(lists + group)
    outs = length(out_count, its_list, out_channels)
    position = first + tl.arange(0, CHANNELS)
    listed = position < outs
    channel = position
    if out_index is not None:
        channel = tl.load(out_index + its_list.to(tl.int64) * out_channels + position, position < out_channels, other=0)
    sample = group * shared + row // pixels
    if order is not None:
        sample = tl.load(order + sample, row < shared * pixels, other=samples)
    row_open = (row < shared * pixels) & (sample < samples)
    p = row % pixels // out_width
    q = row % pixels % out_width

    ins = length(in_count, its_list, in_channels)
    readable = ins
    if PACKED_IN:
        readable = rounded(ins)
    # Taps run fastest: one slice of the input's channels serves them all before the next one is fetched.
    steps = R * S * tl.cdiv(ins, DEPTH)
    whole = R * S * (ins // DEPTH)
    if not PACKED_OUT:
        steps = tl.where(first < outs, steps, 0)
    if order is not None:  # places are filled from the first one on: is there anybody in the tile's?
        nobody = tl.load(order + group * shared + tl.min(row, 0) // pixels) >= samples
        steps = tl.where(nobody, 0, steps)
    start = 0
    if SPLITS > 1:
        share = tl.cdiv(steps, SPLITS)
        start = split * share
        steps = tl.minimum(start + share, steps)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    x_rows = x + sample.to(tl.int64) * x_stride_n
    weight_columns = weight + (channel // BLOCK).to(tl.int64) * weight_stride_k + channel % BLOCK
    # A count is any number, and a load that ends there moves single numbers: where nothing says that zeros follow,
    # whole slices are read without asking, and the last one by itself.
    ALONE: tl.constexpr = in_count is not None and not PACKED_IN
    for last in tl.static_range(2 if ALONE else 1):
        begin = start
        end = steps
        if ALONE:
            begin = tl.maximum(start, whole) if last else start
            end = steps if last else tl.minimum(steps, whole)
        for step in range(begin, end):
            if ALONE and last:
                tap = step - whole
                k = ins // DEPTH * DEPTH + tl.arange(0, DEPTH)
            else:
                tap = step % (R * S)
                k = step // (R * S) * DEPTH + tl.arange(0, DEPTH)
            r = tap // S
            s = tap % S
            h = p * STRIDE_H - PADDING_H + r * DILATION_H
            w = q * STRIDE_W - PADDING_W + s * DILATION_W
            inside = row_open & (h >= 0) & (w >= 0)
            if SPREAD_H > 1:
                inside &= h % SPREAD_H == 0
                h //= SPREAD_H
            if SPREAD_W > 1:
                inside &= w % SPREAD_W == 0
                w //= SPREAD_W
            inside &= (h < height) & (w < width)
            at = x_rows + (h * x_stride_h + w * x_stride_w)
            pixel_there = inside[:, None]
            weight_there = listed[None, :]
            if last or not ALONE:
                pixel_there = inside[:, None] & (k < readable)[None, :]
                weight_there = (k < ins)[:, None] & listed[None, :]
            a = tl.load(at[:, None] + k[None, :], pixel_there, other=0.0)
            row_of_weights = k
            if in_index is not None:
                row_of_weights = tl.load(in_index + its_list.to(tl.int64) * in_channels + k, k < ins, other=0)
            if MIRRORED:
                r = R - 1 - r
                s = S - 1 - s
            at_weight = weight_columns[None, :] + (row_of_weights * weight_stride_c)[:, None]
            at_weight += r * weight_stride_r + s * weight_stride_s
            b = tl.load(at_weight, weight_there, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)

    finishes = True
    if SPLITS > 1:
        # A part's sums lie as its tile has them: who finishes the tile has the same numbers in the same places.
        within = tl.arange(0, ROWS)[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        parts = partial + tile.to(tl.int64) * (SPLITS * ROWS * CHANNELS)
        tl.store(parts + split * (ROWS * CHANNELS) + within, total)
        tl.debug_barrier()  # all threads of the program have stored before one of them says so
        finishes = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if finishes:
        if SPLITS > 1:
            tl.store(arrived + tile, 0)  # as the next convolution finds it
            total = tl.zeros((ROWS, CHANNELS), tl.float32)
            for other in range(SPLITS):  # not unrolled here: all parts of a large tile are more than registers hold
                total += tl.load(parts + other * (ROWS * CHANNELS) + within)
        if bias is not None:
            total += tl.load(bias + channel, listed, other=0.0).to(tl.float32)[None, :]
        written = position if PACKED_OUT else channel
        until = rounded(outs) if PACKED_OUT else out_channels
        at_y = sample.to(tl.int64) * y_stride_n + p * y_stride_h + q * y_stride_w
        at_y = at_y[:, None] + written[None, :]
        stored = row_open[:, None] & (position < until)[None, :]
        if residual is not None:
            total += tl.load(residual + at_y, stored, other=0.0).to(tl.float32)
        if RELU:
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(listed[None, :], total, 0.0)  # a selection: weights of zero let a NaN or infinity of x pass
        if gate is not None:
            at_gate = gate + sample.to(tl.int64)[:, None] * out_channels + channel[None, :]
            total = tl.where(tl.load(at_gate, row_open[:, None] & listed[None, :], other=0) != 0, total, 0.0)
        result = total.to(y.dtype.element_ty)
        tl.store(y + at_y, result, stored)
        if sums is not None:  # of what is stored; a group is one sample then
            added = tl.where(stored, result.to(tl.float32), 0.0)
            added = tl.sum(tl.reshape(added, (ROWS // SLOT, SLOT, CHANNELS)), 1)
            slot = tl.min(row, 0) // SLOT + tl.arange(0, ROWS // SLOT)
            slots = tl.cdiv(pixels, SLOT)
            at = (group.to(tl.int64) * slots + slot)[:, None] * out_channels + written[None, :]
            tl.store(sums + at, added, (slot < slots)[:, None] & (position < out_channels)[None, :])


@triton.jit
def ragged_conv_kernel(
    x,  # (samples, height, width, channels), channels dense
    weight,  # any strides; with BLOCK: (blocks, in_channels, R, S, BLOCK), blocks of outputs
    bias,  # (out_channels,) or None
    residual,  # strides of y, or None
    gate,  # bool (samples, out_channels): outputs that are zero although their list has them, or None
    y,  # (samples, out_height, out_width, channels), channels dense
    sums,  # float32 (samples, pixels / SLOT, out_channels): of pixels of y, where all is written; or None
    in_index,
    in_count,
    out_index,
    out_count,
    order,  # int32 (groups * shared,): the sample at every place of the groups, ``samples`` at empty ones; None: as is
    lists,  # int32 (groups,): the list of every group; None: the one of its number
    tiles,  # int32: from schedule_kernel; None: a program for each tile that there can be
    partial,  # float32 (tiles, SPLITS, ROWS, CHANNELS): sums of parts of the reduction; None: it is not split
    arrived,  # int32 (tiles,): how many parts there are, with ``partial``; zeros, before and afterwards
    samples,
    shared,  # samples of a group, which share a list
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    weight_stride_k,
    weight_stride_c,
    weight_stride_r,
    weight_stride_s,
    y_stride_n,
    y_stride_h,
    y_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,  # may be negative in a gradient
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPREAD_H: tl.constexpr,  # x is taken with so many pixels between its own, zeros: the gradient of a stride
    SPREAD_W: tl.constexpr,
    MIRRORED: tl.constexpr,  # taps in reverse order: the gradient of a window
    RELU: tl.constexpr,
    PACKED_IN: tl.constexpr,  # x is packed, with zeros behind its count up to a multiple of STEP
    PACKED_OUT: tl.constexpr,  # write listed channels side by side; else each at its place, and zeros for the others
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,  # outputs that lie side by side in a block of weights; 1: no blocks
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of the reduction, the grid's second axis
):
    """Convolve tiles of pixels by listed output channels: one a program, or those of a list of tiles in turn."""
    tensors = (x, weight, bias, residual, gate, y, sums, partial, arrived)
    sides = (in_index, in_count, out_index, out_count, order, lists)
    sizes = (samples, shared, height, width, in_channels, out_height, out_width, out_channels)
    strides = (
        x_stride_n, x_stride_h, x_stride_w, weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
        y_stride_n, y_stride_h, y_stride_w,
    )  # fmt: skip
    if tiles is not None:
        for scheduled in range(tl.program_id(0), tl.load(tiles), tl.num_programs(0)):
            convolve_tile(
                tl.load(tiles + 1 + scheduled), 0, tensors, sides, sizes, strides, R, S, STRIDE_H, STRIDE_W, PADDING_H,
                PADDING_W, DILATION_H, DILATION_W, SPREAD_H, SPREAD_W, MIRRORED, RELU, PACKED_IN, PACKED_OUT, PRECISION,
                BLOCK, ROWS, CHANNELS, DEPTH, SPLITS,
            )  # fmt: skip
    else:
        if PACKED_OUT:
            row_tiles = tl.cdiv(shared * out_height * out_width, ROWS)
            group, _, first = place(tl.program_id(0), row_tiles, tl.cdiv(out_channels, CHANNELS), ROWS, CHANNELS)
            if lists is not None:
                group = tl.load(lists + group)
            if first >= length(out_count, group, out_channels):
                return
        convolve_tile(
            tl.program_id(0), tl.program_id(1), tensors, sides, sizes, strides, R, S, STRIDE_H, STRIDE_W, PADDING_H,
            PADDING_W, DILATION_H, DILATION_W, SPREAD_H, SPREAD_W, MIRRORED, RELU, PACKED_IN, PACKED_OUT, PRECISION,
            BLOCK, ROWS, CHANNELS, DEPTH, SPLITS,
        )  # fmt: skip


@triton.jit
def pack_kernel(
    x,  # (samples, channels, height, width), any strides
    packed,  # (samples, height * width, packed_stride_pixel), channels dense
    index,
    count,
    pixels,
    width,
    channels,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    packed_stride_n,
    packed_stride_pixel,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program some pixels by some positions of one sample: bring its listed channels side by side."""
    sample = tl.program_id(0)
    listed = tl.load(count + sample)
    first = tl.program_id(2) * CHANNELS
    if first >= listed:
        return
    position = first + tl.arange(0, CHANNELS)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.load(index + sample.to(tl.int64) * channels + position, position < listed, other=0)
    at = x + sample.to(tl.int64) * x_stride_n + channel.to(tl.int64)[None, :] * x_stride_c
    at += (pixel // width * x_stride_h + pixel % width * x_stride_w)[:, None]
    inside = (pixel < pixels)[:, None]
    values = tl.load(at, inside & (position < listed)[None, :], other=0.0)
    at = packed + sample.to(tl.int64) * packed_stride_n + pixel[:, None] * packed_stride_pixel + position[None, :]
    tl.store(at, values, inside & (position < rounded(listed))[None, :])
