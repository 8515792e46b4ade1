"""Whether a block's time grows with its work: a line through its times over the fraction kept, batch 16.

``python -m bench.growth`` prints the table of docs/performance.md: for every shape and kind of kernels how much of the
variance the line explains (R²), and what it says that nothing kept would cost, of the time with everything kept.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

import gatedkernels as gk
from bench.cases import SHAPES
from gatedkernels.nn import GatedBasicBlock

KINDS = ("direct", "tiles", "bfloat16")
_DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
_FEWEST_ON_TILES = 0.3  # below, `optimize`'s blocks may leave the tiles, and the line would be one of two kernels
_BATCH = 16


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """R² of the straight line through some points, and its height at x = 0 over that at x = 1."""
    line = statistics.linear_regression(x, y)
    return statistics.correlation(x, y) ** 2, line.intercept / (line.intercept + line.slope)


def times(channels: int, size: int, kind: str, rounds: int) -> tuple[list[float], list[float]]:
    """Fractions kept by a block, and its milliseconds: medians, the fractions in turn in every round."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x = torch.randn(_BATCH, channels, size, size).to(dtype, memory_format=torch.channels_last)
    fast = gk.optimize(GatedBasicBlock(channels, channels).eval().to(dtype), x)
    if kind == "direct":
        fast.tiles1 = fast.tiles2 = None
    densities = [d for d in _DENSITIES if kind != "tiles" or d >= _FEWEST_ON_TILES]
    kept, measured = [], {density: [] for density in densities}
    with torch.inference_mode():
        for density in densities:
            with gk.fix_gates(fast, density):
                kept.append(gk.count_flops(fast, x).kept)
        for _ in range(rounds):
            for density in densities:
                with gk.fix_gates(fast, density):
                    fast(x)
                    start = time.perf_counter()
                    fast(x)
                    measured[density].append(1e3 * (time.perf_counter() - start))
    return kept, [statistics.median(measured[density]) for density in densities]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| channels, size | kind | R² | at nothing kept, of the time with all |\n| --- | --- | ---: | ---: |")
    for kind in KINDS:
        for channels, size in SHAPES:
            if kind == "tiles" and size < 5:  # too few for a vector: such images are never computed on tiles
                continue
            r2, intercept = fit(*times(channels, size, kind, options.rounds))
            print(f"| {channels}, {size}×{size} | {kind} | {r2:.4f} | {intercept:.1%} |", flush=True)


if __name__ == "__main__":
    main()
