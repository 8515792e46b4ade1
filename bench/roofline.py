"""How far blocks are from what the machine allows: ``python -m bench.roofline [FILE] [--below 0.95]``.

For each block of a file of results: the time that its multiply-adds take at the machine's peak, the time that its bytes
take from memory, and what any call costs; the longer one of the first two, the gate's weights, which come before, and
the call are the least that a direct convolution can take. Peak, bandwidth and call are measured first: with PyTorch's
matrix product, with a sum over memory, and with a block that has next to nothing to do. Tiles need fewer multiply-adds,
so that blocks on tiles may be faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import gatedkernels as gk
from bench.results import Results, latest
from bench.runner import Cell
from gatedkernels.nn import ChannelGate, GatedBasicBlock

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Machine:
    """What it can do, on the threads that PyTorch is set to.

    Attributes:
        flops: FLOP/s by dtype's name.
        bandwidth: Bytes/s from memory.
        cache: Bytes of the last-level cache.
        call: Seconds of an optimised block with next to no work.
    """

    flops: dict[str, float]
    bandwidth: float
    cache: int
    call: float

    @classmethod
    def here(cls) -> "Machine":
        """Measure this one."""
        flops = {name: _matrix_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
        cache = int(_CACHE.read_text().strip().removesuffix("K")) << 10 if _CACHE.exists() else 32 << 20
        return cls(flops, _bandwidth(), cache, _call())


@dataclass(frozen=True)
class Bound:
    """Seconds that a block cannot do without."""

    arithmetic: float
    memory: float
    gate: float
    call: float

    @property
    def total(self) -> float:
        """What is left if memory and arithmetic overlap, but for the gate, whose decisions come first."""
        return max(self.arithmetic, self.memory) + self.gate + self.call


def bound(facts: dict, kept: float, machine: Machine) -> Bound:
    """The least time of a block.

    Args:
        facts: Those of its cell: channels, size, batch, density, dtype.
        kept: Fraction of its FLOPs that are executed.
        machine: Where.
    """
    channels, size, batch = facts["channels"], facts["size"], facts["batch"]
    width = 2 if facts["dtype"] == "bfloat16" else 4
    inside = (3 * size - 2) ** 2  # taps of all windows of an image, without those in the padding
    operations = 4 * batch * channels * channels * inside * kept
    union = 1 - (1 - facts["density"]) ** batch
    weights, image = 18 * channels * channels * width, batch * channels * size * size * width
    gate = 4 * sum(weight.numel() for weight in ChannelGate(channels, channels).parameters() if weight.ndim > 1)
    # The dense way runs in turn with ours, so that the cache holds half of either's; results are fetched and written.
    if 2 * (weights + 3 * image) <= machine.cache:
        return Bound(operations / machine.flops[facts["dtype"]], 0.0, 0.0, machine.call)
    memory = (weights * union if 2 * weights > machine.cache / 2 else 0) + 3 * image
    return Bound(
        operations / machine.flops[facts["dtype"]], memory / machine.bandwidth, gate / machine.bandwidth, machine.call
    )


def row(cell: Cell, machine: Machine) -> str:
    """A line of the table."""
    facts, least = cell.facts, bound(cell.facts, cell.kept, machine)
    dense, gated = cell.dense_ms[0], cell.gated_ms[0]
    parts = " | ".join(f"{1e3 * part:.3f}" for part in (least.arithmetic, least.memory, least.gate, least.total))
    name = f"{facts['channels']}, {facts['size']}×{facts['size']}, {facts['batch']}"
    possible = dense / (1e3 * least.total) * cell.kept
    return f"| {name} | {facts['density']:g} | {parts} | {gated:.3f} | {cell.efficiency:.2f} | {possible:.2f} |"


def _best(call: Callable[[], object], times: int) -> float:
    call()
    return min(_seconds(call) for _ in range(times))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _matrix_rate(dtype: torch.dtype) -> float:
    size = 1536
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, 30)


def _bandwidth() -> float:
    memory = torch.zeros(1 << 26)
    return memory.nbytes / _best(memory.sum, 30)


def _call() -> float:
    x = torch.randn(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        fast = gk.optimize(GatedBasicBlock(16, 16).eval(), x)
        return statistics.median(_seconds(lambda: fast(x)) for _ in range(2000))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="file of results; the newest without one")
    parser.add_argument("--below", type=float, default=float("inf"), help="only blocks of a lower efficiency")
    options = parser.parse_args()
    results = Results.load(options.file or latest())
    torch.set_num_threads(results.machine["threads"])
    machine = Machine.here()
    rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s in {name}" for name, rate in machine.flops.items())
    print(f"{rates}; {1e-9 * machine.bandwidth:.1f} GB/s; a call {1e6 * machine.call:.0f} µs\n")
    print("| block, batch | open | arithmetic, ms | memory | gate | least | measured | efficiency | possible |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cell in results.cells:
        is_block = cell.group in ("block", "block_bf16") and cell.facts["cache"] == "warm"
        if is_block and cell.efficiency < options.below:
            print(row(cell, machine))


if __name__ == "__main__":
    main()
