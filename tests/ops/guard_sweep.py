"""Calls every CPU operator on tensors that touch forbidden memory; started by test_isa.py.

Every input lies at the very end of its memory, before a page that must not be read, or at the very beginning, after
one: reading beyond it ends the process. Before each call its case is printed. Fetching ahead does not count: it faults
nowhere.

With the argument "overread" a tensor is read one element beyond its end, which must end the process.
"""

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.packed import pack_blocks, pack_rows, pack_stem, pack_stem_tiles, pack_tile_blocks, pack_tile_rows

PAGE = mmap.PAGESIZE
PROT_NONE = 0
# N, C, K, H, W: channels around the lanes and blocks of every set, images around its tiles; and filters so large that
# they are walked in slices
SIZES = [
    (1, 1, 1, 1, 1), (2, 3, 33, 5, 17), (2, 16, 32, 4, 4), (3, 31, 20, 7, 3), (1, 37, 70, 3, 9), (2, 65, 5, 2, 11),
    (1, 8, 31, 1, 13), (5, 24, 17, 13, 1), (2, 9, 64, 4, 6), (1, 40, 1, 3, 35), (2, 63, 95, 6, 14), (1, 130, 129, 2, 2),
    (20, 300, 40, 3, 3),
]  # fmt: skip
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}

ops = torch.ops.gatedkernels
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def guard(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy of a dense tensor, of the same strides, that ends where a forbidden page begins, or begins behind one."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + PAGE + room):
        if libc.mprotect(page, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + room - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def each(arguments: Iterable[Any], change: Callable[[Tensor], Any]) -> list[Any]:
    """The arguments, tensors changed, those in lists too."""
    return [change(a) if isinstance(a, Tensor) else each(a, change) if isinstance(a, list) else a for a in arguments]


def check(name: str, *arguments: Any, results: int | None = None) -> None:
    """Call an operator on guarded tensors; elsewhere in memory the first ``results`` of its results are the same."""
    expected = getattr(ops, name)(*arguments)
    for at_end in (True, False):
        print(name, "end" if at_end else "begin", *each(arguments, lambda a: (tuple(a.shape), a.stride())), flush=True)
        guarded = each(arguments, lambda a, at_end=at_end: guard(a, at_end))
        actual = getattr(ops, name)(*guarded)
        both = ((r if isinstance(r, tuple) else (r,))[:results] for r in (actual, expected))
        for a, e in zip(*both, strict=True):
            assert torch.equal(a, e), name


def check_convolutions(
    n: int, c: int, k: int, h: int, w: int, side: int, stride: int, form: str, density: float
) -> None:
    """The operators of one convolution."""
    x = torch.randn(n, c, h, w).contiguous(memory_format=FORMATS[form])
    weight, bias = torch.randn(k, c, side, side), torch.randn(k)
    in_mask, out_mask = torch.rand(n, c) < density, torch.rand(n, k) < density
    in_plan, out_plan = gk.plan(in_mask), gk.plan(out_mask)
    residual = torch.randn(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1).contiguous(memory_format=FORMATS[form])
    for filters in (weight, weight.contiguous(memory_format=torch.channels_last)):
        check("conv_out_cpu", x, filters, bias, *out_plan, stride, True)
        check("conv_in_cpu", x, filters, bias, *in_plan, stride)
        for masks in ((None, None), (in_mask, None), (None, out_mask), (in_mask, out_mask)):
            check("gated_conv2d_cpu", x, filters, bias, *masks, 2.0, stride)
        check_backward(x, filters, torch.randn_like(residual), in_mask, out_mask, stride)
        widths = in_mask.sum(1, dtype=torch.int32), out_mask.sum(1, dtype=torch.int32)
        check("sliced_conv2d_cpu", x, filters, bias, *widths, stride)
    blocks = pack_blocks(weight)
    for masks in ((None, None), (in_mask, None), (None, out_mask), (in_mask, out_mask)):
        check("packed_conv2d", x, blocks, bias, *masks, residual, k, stride, True)


def check_backward(x: Tensor, weight: Tensor, dy: Tensor, in_mask: Tensor, out_mask: Tensor, stride: int) -> None:
    """The gradients of one convolution that there are kernels for."""
    for masks in ((in_mask, None), (None, out_mask), (in_mask, out_mask)):
        strided = masks[1] is not None and weight.shape[2] == 3
        check("gated_conv2d_backward_cpu", dy, x, weight, *masks, stride, False, stride == 1 or strided, True)


def check_blocks(n: int, c: int, k: int, h: int, w: int, stride: int, form: str, density: float) -> None:
    """The operators of a gated block."""
    m = c + 2
    x = torch.randn(n, c, h, w).contiguous(memory_format=FORMATS[form])
    weight1, bias1, weight2, bias2 = torch.randn(m, c, 3, 3), torch.randn(m), torch.randn(k, m, 3, 3), torch.randn(k)
    mask = torch.rand(n, m) < density
    residual = torch.randn(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1).contiguous(memory_format=FORMATS[form])
    for rest in (residual, None):
        tensors = x, weight1, bias1, weight2, bias2, mask, rest
        check("gated_block_cpu", *tensors, 2.0, stride)
        check("gated_block_kept_cpu", *tensors, stride, results=1)  # of the other one only the open planes are written
        y, hidden = ops.gated_block_kept_cpu(*tensors, stride)
        check(
            "gated_block_backward_cpu",
            torch.randn_like(y),
            y,
            x,
            hidden,
            weight1,
            weight2,
            mask,
            stride,
            True,
            True,
            True,
        )
        weights = pack_rows(weight1), bias1, pack_blocks(weight2), bias2
        check("packed_block", x, *weights, None, None, mask, rest, stride)
        tiles = pack_tile_rows(weight1) if stride == 1 else None, pack_tile_blocks(weight2)
        check("packed_block", x, *weights, *tiles, mask, rest, stride)
        narrow = [None if t is None else t.bfloat16() for t in (x, *weights, rest)]
        tiles = (pack_tile_rows(weight1.bfloat16()) if stride == 1 else None), pack_tile_blocks(weight2.bfloat16())
        for own in ((None, None), tiles):
            check("packed_block", *narrow[:-1], *own, mask, narrow[-1], stride)


def check_bottlenecks(n: int, c: int, k: int, h: int, w: int, stride: int, form: str, density: float) -> None:
    """The operator of a whole bottleneck."""
    m = k + 30
    x = torch.randn(n, c, h, w).contiguous(memory_format=FORMATS[form])
    gates = [torch.randn(shape) for inputs in (c, m) for shape in ((3, inputs), (3,), (m, 3), (m,))]
    shapes = ((m, c, 1, 1), (m,), (m, m, 3, 3), (m,), (k, m, 1, 1), (k,), (k, c, 1, 1), (k,))
    weights = [torch.randn(shape) for shape in shapes]
    weights = [t if i == 0 or t.ndim == 1 else pack_blocks(t) for i, t in enumerate(weights)]
    masks = torch.rand(n, m) < density, torch.rand(n, m) < density
    check("packed_bottleneck", x, [*gates, *weights], None, None, stride)
    check("packed_bottleneck", x, [*[None] * 8, *weights], *masks, stride)


def check_linears(n: int, c: int, k: int, tokens: int, density: float) -> None:
    """Linear layers with a width for every sample."""
    x, weight, bias = torch.randn(n, tokens, c), torch.randn(k, c), torch.randn(k)
    widths = [(torch.rand(n, most) < density).sum(1, dtype=torch.int32) for most in (c, k)]
    check("sliced_linear_cpu", x, weight, bias, *widths)


def check_widths_on_tiles(form: str, density: float) -> None:
    """Enough tiles, and channels, for a width for every sample to run on them; odd sizes, and no full block."""
    x = torch.randn(8, 37, 13, 11).contiguous(memory_format=FORMATS[form])
    weight, bias = torch.randn(70, 37, 3, 3), torch.randn(70)
    widths = [(torch.rand(8, most) < density).sum(1, dtype=torch.int32) for most in (37, 70)]
    check("sliced_conv2d_cpu", x, weight, bias, *widths, 1)


def check_stems(n: int, c: int, k: int, h: int, w: int) -> None:
    """The first layer, whose window is padded so that it fits."""
    x, bias = torch.randn(n, c, h, w), torch.randn(k)
    for side, stride, pool in ((3, 1, False), (7, 2, True)):
        filters = torch.randn(k, c, side, side)
        weight, tiles = pack_stem(filters), pack_stem_tiles(filters) if side == 7 else None
        for dtype in (torch.float32, torch.bfloat16):
            tensors = (t.to(dtype) for t in (x, weight, bias))
            check("packed_stem", *tensors, stride, side // 2, True, pool, tiles)


def main() -> None:
    """Sweep over sizes, strides, layouts and densities."""
    assert _extension.CPU_ERROR is None, _extension.CPU_ERROR
    torch.manual_seed(0)
    if sys.argv[1:] == ["overread"]:
        print("overread", flush=True)
        ctypes.string_at(guard(torch.ones(3), at_end=True).data_ptr(), 13)
    for (n, c, k, h, w), form in itertools.product(SIZES, FORMATS):
        x = torch.randn(n, c, h, w).contiguous(memory_format=FORMATS[form])
        check_stems(n, c, k, h, w)
        check("channel_gate", x, torch.randn(k, c), torch.randn(k), torch.randn(c, k), torch.randn(c))
        for stride, density in itertools.product((1, 2), (0.0, 0.5, 1.0)):
            check("plan_cpu", torch.rand(n, c) < density)
            for side in (1, 3):
                check_convolutions(n, c, k, h, w, side, stride, form, density)
            check_blocks(n, c, k, h, w, stride, form, density)
            check_bottlenecks(n, c, k, h, w, stride, form, density)
            check_linears(n, c, k, h * w, density)
    for form, density in itertools.product(FORMATS, (0.5, 1.0)):
        check_widths_on_tiles(form, density)
    print("whole")


if __name__ == "__main__":
    main()
