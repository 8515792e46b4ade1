"""What a call costs where there is nothing to compute: ``python -m bench.dispatch``.

Operators, as modules and functions call them, and the functions, on empty batches of 32 channels. Microseconds in
inference mode and otherwise, the smallest of 40 means of 100 calls: what the processor does beside makes a mean larger,
and never smaller.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import conv2d

from gatedkernels import _extension, gated_block, gated_conv2d, plan
from gatedkernels.ops.packed import pack_blocks, pack_rows, pack_tile_blocks, pack_tile_rows

Call = Callable[[], object]

_CHANNELS = 32
_MEANS, _CALLS = 40, 100


def calls() -> dict[str, Call]:
    """A call of each operator and function by name."""
    if _extension.CPU_ERROR is not None:
        raise RuntimeError(str(_extension.CPU_ERROR))
    ops, last = torch.ops.gatedkernels, torch.channels_last
    x = torch.randn(0, _CHANNELS, 8, 8).contiguous(memory_format=last)
    mask = torch.zeros(0, _CHANNELS, dtype=torch.bool)
    weight, point = torch.randn(_CHANNELS, _CHANNELS, 3, 3), torch.randn(_CHANNELS, _CHANNELS, 1, 1)
    as_last, bias = weight.contiguous(memory_format=last), torch.randn(_CHANNELS)
    gate = torch.randn(8, _CHANNELS), torch.randn(8), torch.randn(_CHANNELS, 8), bias
    block = pack_rows(weight), bias, pack_blocks(weight), bias
    plain, tiled = (*block, None, None), (*block, pack_tile_rows(weight), pack_tile_blocks(weight))
    shortcut = pack_blocks(point), bias
    plan_cpu, pool, channel_gate = ops.plan_cpu.default, ops.packed_pool.default, ops.channel_gate.default
    packed_conv2d, packed_block = ops.packed_conv2d.default, ops.packed_block.default
    residual, conv_cpu, block_cpu = (
        ops.packed_residual.default,
        ops.gated_conv2d_cpu.default,
        ops.gated_block_cpu.default,
    )
    return {
        "plan_cpu": lambda: plan_cpu(mask),
        "packed_pool": lambda: pool(x),
        "channel_gate": lambda: channel_gate(x, *gate),
        "packed_conv2d": lambda: packed_conv2d(x, block[2], bias, None, None, None, _CHANNELS, 1, True),
        "packed_block": lambda: packed_block(x, *plain, mask, x),
        "packed_block, its stride handed over": lambda: packed_block(x, *plain, mask, x, 1),
        "packed_block, its overload looked for": lambda: ops.packed_block(x, *plain, mask, x),
        "packed_block, on tiles": lambda: packed_block(x, *tiled, mask, x),
        "packed_residual": lambda: residual(x, *gate, *tiled),
        "packed_residual, no shortcut and no mask handed over": lambda: residual(x, *gate, *tiled, None, None, None),
        "packed_residual, with a shortcut": lambda: residual(x, *gate, *tiled, *shortcut, None, 1),
        "packed_residual, with a shortcut and a mask": lambda: residual(x, *gate, *tiled, *shortcut, mask, 1),
        "gated_conv2d_cpu": lambda: conv_cpu(x, weight, bias, None, mask, 1.0),
        "gated_conv2d_cpu, filters channels-last": lambda: conv_cpu(x, as_last, bias, None, mask, 1.0),
        "gated_block_cpu": lambda: block_cpu(x, weight, bias, weight, bias, mask, x, 1.0),
        "gated_block_cpu, filters channels-last": lambda: block_cpu(x, as_last, bias, as_last, bias, mask, x, 1.0),
        "function plan": lambda: plan(mask),
        "function gated_conv2d": lambda: gated_conv2d(x, weight, bias, out_mask=mask, padding=1),
        "function gated_block": lambda: gated_block(x, weight, bias, weight, bias, mask, residual=x),
        "PyTorch's conv2d": lambda: conv2d(x, as_last, bias, 1, 1),
    }


def microseconds(call: Call) -> float:
    """The smallest mean."""
    call()
    means = []
    for _ in range(_MEANS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        means.append((time.perf_counter() - start) / _CALLS)
    return 1e6 * min(means)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print("| call | inference mode, µs | otherwise |\n| --- | ---: | ---: |")
    for name, call in calls().items():
        with torch.inference_mode():
            inside = microseconds(call)
        print(f"| {name} | {inside:.1f} | {microseconds(call):.1f} |", flush=True)


if __name__ == "__main__":
    main()
