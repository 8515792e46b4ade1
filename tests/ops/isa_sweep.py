"""Runs every CPU kernel on one instruction set; started by test_isa.py in a process of its own.

Prints the instruction set. A kernel whose error exceeds what the order of summation explains ends it with a traceback.
"""

import ctypes
import itertools

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.packed import pack_blocks, pack_rows
from gatedkernels.ops.plan.reference import pack

ops = torch.ops.gatedkernels
# C, K, H, W: channels around the lanes and blocks of every set, images around its tiles
SIZES = [(1, 1, 1, 1), (3, 33, 5, 17), (16, 32, 4, 4), (31, 20, 7, 3), (37, 70, 3, 9), (64, 64, 8, 8), (65, 5, 2, 11)]


def where(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask[:, :, None, None], x, 0)


def check(name: str, y: Tensor, exact: Tensor) -> None:
    error, norm = float((y.double() - exact).norm()), float(exact.norm())
    assert error <= 1e-6 * norm, f"{name}: error {error:.3g} of {norm:.3g}"  # NaN fails too


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
        y = ops.packed_conv2d(x, pack_blocks(weight), bias, inside, outside, None, k, stride, True)
        check(f"packed_conv2d {case}", y, where(outside, exact_in.relu()))


def blocks(c: int, k: int, h: int, w: int, stride: int) -> None:
    n, m, case = 3, 45, (c, k, h, w, stride)
    x, w1, b1, w2, b2 = (torch.randn(*s) for s in ((n, c, h, w), (m, c, 3, 3), (m,), (k, m, 3, 3), (k,)))
    mask, residual = torch.rand(n, m) < 0.5, torch.randn(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    wide = [t.double() for t in (x, w1, b1, w2, b2, residual)]
    hidden = where(mask, conv2d(*wide[:3], stride, 1).relu())
    exact = (conv2d(hidden, *wide[3:5], 1, 1) + wide[5]).relu()
    y = gk.gated_block(x, w1, b1, w2, b2, mask, residual=residual, stride=stride, backend="cpu")
    check(f"gated_block {case}", y, exact)
    y = ops.packed_block(x, pack_rows(w1), b1, pack_blocks(w2), b2, mask, residual, stride)
    check(f"packed_block {case}", y, exact)


def gates(c: int, k: int, h: int, w: int) -> None:
    x, w1, b1, w2, b2 = (torch.randn(*s) for s in ((3, c, h, w), (19, c), (19,), (k, 19), (k,)))
    wide = [t.double() for t in (x, w1, b1, w2, b2)]
    logits = linear(linear(wide[0].mean((2, 3)), *wide[1:3]).relu(), *wide[3:])
    for layout in (torch.contiguous_format, torch.channels_last):
        mask = ops.channel_gate(x.contiguous(memory_format=layout), w1, b1, w2, b2)
        assert torch.equal(mask | (logits.abs() < 1e-4), (logits >= 0) | (logits.abs() < 1e-4)), f"gate {(c, k, h, w)}"


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


def main() -> None:
    """Run them all."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    assert _extension.CPU_ERROR is None, _extension.CPU_ERROR
    for size, side, stride in itertools.product(SIZES, (1, 3), (1, 2)):
        convolutions(*size, side, stride)
    for size, stride in itertools.product(SIZES, (1, 2)):
        blocks(*size, stride)
    for size in SIZES:
        gates(*size)
    for (c, k, _, _), tokens in itertools.product([*SIZES, (200, 150, 1, 1)], (1, 5, 25, 300)):
        linears(c, k, tokens)
    name = ctypes.CDLL(str(_extension.find("_cpu"))).gatedkernels_cpu_isa
    name.restype = ctypes.c_char_p
    print(name().decode())


if __name__ == "__main__":
    main()
