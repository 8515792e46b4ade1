"""Runs every CPU kernel on one instruction set; started by test_isa.py in a process of its own.

Prints the instruction set. A kernel whose error exceeds what the order of summation explains ends it with a traceback.
"""

import ctypes
import itertools

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, max_pool2d

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.packed import pack_blocks, pack_rows, pack_stem, pack_stem_tiles, pack_tile_blocks, pack_tile_rows
from gatedkernels.ops.plan.reference import pack

ops = torch.ops.gatedkernels
# C, K, H, W: channels around the lanes and blocks of every set, images around its tiles
SIZES = [
    (1, 1, 1, 1), (3, 33, 5, 17), (16, 32, 4, 4), (31, 20, 7, 3), (37, 70, 3, 9), (64, 64, 8, 8), (65, 5, 2, 11),
    (33, 40, 15, 22),
]  # fmt: skip


def where(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask[:, :, None, None], x, 0)


def check(name: str, y: Tensor, exact: Tensor) -> None:
    error, norm = float((y.double() - exact).norm()), float(exact.norm())
    tolerance = 1e-6 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    assert error <= tolerance * norm, f"{name}: error {error:.3g} of {norm:.3g}"  # NaN fails too


def convolutions(c: int, k: int, h: int, w: int, side: int, stride: int) -> None:
    n, case = 3, (c, k, h, w, side, stride)
    x, weight, bias = torch.randn(n, c, h, w), torch.randn(k, c, side, side), torch.randn(k)
    inside, outside = torch.rand(n, c) < 0.6, torch.rand(n, k) < 0.6
    options = {"stride": stride, "padding": side // 2}
    wide = [t.double() for t in (x, weight, bias)]
    exact = conv2d(*wide, **options)
    exact_in = conv2d(where(inside, wide[0]), *wide[1:], **options)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        run = {**options, "backend": "cpu"}
        check(f"in {case}", gk.gated_conv2d(x, weight, bias, inside, None, **run), exact_in)
        check(f"out {case}", gk.gated_conv2d(x, weight, bias, None, outside, **run), where(outside, exact))
        both = gk.gated_conv2d(x, weight, bias, inside, outside, **run)
        check(f"both {case}", both, where(outside, exact_in))
        plan = gk.plan(outside)
        y = gk.conv_out(x, weight, bias, *plan, relu=True, **run)
        check(f"conv_out {case}", y, pack(exact.relu(), *plan))
        plan = gk.plan(inside)
        check(f"conv_in {case}", gk.conv_in(pack(x, *plan), weight, bias, *plan, **run), exact_in)
        for masks in ((inside, None), (None, outside), (inside, outside)):
            gradients(case, x, weight, torch.randn_like(exact, dtype=torch.float32), masks, stride)
        ins, outs = inside.sum(1), outside.sum(1)
        widths = torch.arange(c) < ins[:, None], torch.arange(k) < outs[:, None]
        y = gk.sliced_conv2d(x, weight, bias, ins, outs, **run)
        check(f"sliced {case}", y, where(widths[1], conv2d(where(widths[0], wide[0]), *wide[1:], **options)))
        y = ops.packed_conv2d(x, pack_blocks(weight), bias, inside, outside, None, k, stride, True)
        check(f"packed_conv2d {case}", y, where(outside, exact_in.relu()))


def gradients(
    case: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    stride: int,
) -> None:
    inside, outside = masks
    side, name = weight.shape[2], f"{['', 'in '][inside is not None]}{['', 'out '][outside is not None]}{case}"
    planned = stride == 1 or (outside is not None and side == 3)
    dx, dweight = ops.gated_conv2d_backward_cpu(dy, x, weight, *masks, stride, False, planned, True)
    wide = x.double() if inside is None else where(inside, x.double())
    above = dy.double() if outside is None else where(outside, dy.double())
    exact_dx, exact_dweight, _ = torch.ops.aten.convolution_backward(
        above, wide, weight.double(), None, [stride] * 2, [side // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    check(f"dweight {name}", dweight, exact_dweight)
    if planned:
        check(f"dx {name}", dx, exact_dx if inside is None else where(inside, exact_dx))


def blocks(c: int, k: int, h: int, w: int, stride: int) -> None:
    n, m, case = 3, 145, (c, k, h, w, stride)
    out = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    mask, shapes = torch.rand(n, m) < 0.5, ((n, c, h, w), (m, c, 3, 3), (m,), (k, m, 3, 3), (k,), out)
    for dtype in (torch.float32, torch.bfloat16):
        x, w1, b1, w2, b2, residual = tensors = [torch.randn(*shape).to(dtype) for shape in shapes]
        wide = [t.double() for t in tensors]
        hidden = where(mask, conv2d(*wide[:3], stride, 1).relu())
        exact = (conv2d(hidden, *wide[3:5], 1, 1) + wide[5]).relu()
        if dtype == torch.float32:
            y = gk.gated_block(x, w1, b1, w2, b2, mask, residual=residual, stride=stride, backend="cpu")
            check(f"gated_block {case}", y, exact)
        tiles = pack_tile_rows(w1) if stride == 1 else None, pack_tile_blocks(w2)
        for name, own in (("packed_block", (None, None)), ("packed_block, on tiles", tiles)):
            y = ops.packed_block(x, pack_rows(w1), b1, pack_blocks(w2), b2, *own, mask, residual, stride)
            check(f"{name} {case} {dtype}", y, exact)


def bottlenecks(c: int, k: int, h: int, w: int, stride: int) -> None:
    n, m, case = 3, k + 30, (c, k, h, w, stride)
    mask1, mask2 = torch.rand(n, m) < 0.5, torch.rand(n, m) < 0.3
    shapes = ((n, c, h, w), (m, c, 1, 1), (m,), (m, m, 3, 3), (m,), (k, m, 1, 1), (k,), (k, c, 1, 1), (k,))
    x, w1, b1, w2, b2, w3, b3, ws, bs = tensors = [torch.randn(*shape) for shape in shapes]
    wide = [t.double() for t in tensors]
    hidden = where(mask2, conv2d(where(mask1, conv2d(*wide[:3]).relu()), *wide[3:5], stride, 1).relu())
    exact = (conv2d(hidden, *wide[5:7]) + conv2d(wide[0], *wide[7:], stride)).relu()
    parts = [*[None] * 8, w1, b1, pack_blocks(w2), b2, pack_blocks(w3), b3, pack_blocks(ws), bs]
    check(f"packed_bottleneck {case}", ops.packed_bottleneck(x, parts, mask1, mask2, stride)[0], exact)


def gates(c: int, k: int, h: int, w: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, *weights = (torch.randn(*s).to(dtype) for s in ((3, c, h, w), (19, c), (19,), (k, 19), (k,)))
        w1, b1, w2, b2 = (t.double() for t in weights)
        logits = linear(linear(x.double().mean((2, 3)), w1, b1).relu(), w2, b2)
        near = logits.abs() < 1e-4
        for layout in (torch.contiguous_format, torch.channels_last):
            mask = ops.channel_gate(x.contiguous(memory_format=layout), *weights)
            assert torch.equal(mask | near, (logits >= 0) | near), f"gate {(c, k, h, w)} {dtype}"


def stems(c: int, k: int, h: int, w: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, c, h, w), (k, c, 3, 3), (k,)))
        exact = conv2d(x.double(), weight.double(), bias.double(), 1, 1).relu()
        name = f"packed_stem {(c, k, h, w)} {dtype}"
        check(name, ops.packed_stem(x, pack_stem(weight), bias, 1, 1, True, False), exact)
        pooled = ops.packed_stem(x, pack_stem(weight), bias, 1, 1, True, True)
        check(f"{name}, pooled", pooled, max_pool2d(exact, 3, 2, 1))
    images, weight, bias = x.float()[:, :8], torch.randn(k, min(c, 8), 7, 7), bias.float()  # longer sums lose digits
    exact = conv2d(images.double(), weight.double(), bias.double(), 2, 3)
    on_tiles = ops.packed_stem(images, pack_stem(weight), bias, 2, 3, False, False, pack_stem_tiles(weight))
    check(f"packed_stem {(c, k, h, w)} on tiles", on_tiles, exact)


def linears(c: int, k: int, tokens: int) -> None:
    n, case = 3, (c, k, tokens)
    x, weight, bias = torch.randn(n, tokens, c), torch.randn(k, c), torch.randn(k)
    wide = [t.double() for t in (x, weight, bias)]
    exact = linear(*wide)
    for density in (0.1, 0.6):
        inside, outside = torch.rand(n, c) < density, torch.rand(n, k) < density
        inside[:, 0] = outside[:, -1] = True
        exact_in = linear(torch.where(inside[:, None], wide[0], 0), *wide[1:])
        for form in (weight, weight.T.contiguous().T):
            y = gk.gated_linear(x, form, bias, inside, backend="cpu")
            check(f"linear in {case}", y, exact_in)
            y = gk.gated_linear(x, form, bias, None, outside, backend="cpu")
            check(f"linear out {case}", y, torch.where(outside[:, None], exact, 0))
            y = gk.gated_linear(x, form, bias, inside, outside, backend="cpu")
            check(f"linear both {case}", y, torch.where(outside[:, None], exact_in, 0))
            y = gk.sliced_linear(x, form, bias, inside.sum(1), outside.sum(1), backend="cpu")
            read = torch.where(torch.arange(c) < inside.sum(1)[:, None, None], wide[0], 0)
            kept = torch.arange(k) < outside.sum(1)[:, None, None]
            check(f"linear sliced {case}", y, torch.where(kept, linear(read, *wide[1:]), 0))


def main() -> None:
    """Run them all."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    assert _extension.CPU_ERROR is None, _extension.CPU_ERROR
    for size, side, stride in itertools.product(SIZES, (1, 3), (1, 2)):
        convolutions(*size, side, stride)
    for size, stride in itertools.product(SIZES, (1, 2)):
        blocks(*size, stride)
        bottlenecks(*size, stride)
    for size in SIZES:
        gates(*size)
        stems(*size)
    for (c, k, _, _), tokens in itertools.product([*SIZES, (200, 150, 1, 1)], (1, 5, 25, 300)):
        linears(c, k, tokens)
    name = ctypes.CDLL(str(_extension.find("_cpu"))).gatedkernels_cpu_isa
    name.restype = ctypes.c_char_p
    print(name().decode())


if __name__ == "__main__":
    main()
