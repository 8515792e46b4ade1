"""Two states of the project against each other: is a change faster?

``python -m bench.versus BEFORE AFTER block:256,8,1,0.2 network:32,1,0.3`` takes two checkouts, each with its library
built in place, loads each in a process of its own, and lets them take turns. Cases are channels, image size, batch and
fraction kept of a block, or image size, batch and fraction kept of a gated ResNet-18, in bfloat16 as ``block_bf16:``
and ``network_bf16:``; both after `gk.optimize`, masks fixed; `gatedkernels.models` are those that are installed. It
prints medians, milliseconds, and the median of the ratios, before over after.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

_SETTLE = 0.004  # seconds in which the other process's threads stop waiting busily


def work(cases: list[str]) -> None:
    """In a process of its own: say "ready", then answer each line, the number of a case, by its milliseconds."""
    import torch

    with torch.inference_mode(), ExitStack() as stack:
        calls = [_prepare(case, stack) for case in cases]
        print("ready", flush=True)
        for line in sys.stdin:
            call = calls[int(line)]
            call()
            times = []
            for _ in range(3):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            print(statistics.median(times), flush=True)


def _prepare(case: str, stack: ExitStack) -> Callable[[], object]:
    import torch

    import gatedkernels as gk
    from gatedkernels.nn import GatedBasicBlock

    torch.manual_seed(0)
    name, _, numbers = case.partition(":")
    kind, _, dtype = name.partition("_")
    *sizes, kept = numbers.split(",")
    dtypes = {"": torch.float32, "bf16": torch.bfloat16}
    if dtype not in dtypes or kind not in ("block", "network"):
        raise ValueError(f"a case must begin with block, block_bf16, network or network_bf16 and a colon, got {case!r}")
    if kind == "block":
        channels, size, batch = map(int, sizes)
        model, shape = GatedBasicBlock(channels, channels), (batch, channels, size, size)
    else:
        size, batch = map(int, sizes)
        model = gk.models.gated_resnet18(num_classes=None, stem="cifar" if size < 100 else "imagenet")
        shape = batch, 3, size, size
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).to(dtypes[dtype])
    fast = gk.optimize(model.eval().to(x.dtype), x)
    stack.enter_context(gk.fix_gates(fast, float(kept)))
    return lambda: fast(x)


def start(checkout: Path, cases: list[str], threads: int) -> subprocess.Popen[str]:
    """Start the process that works in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--work", *cases]
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"{checkout} could not prepare the cases; its message is above")
    return process


def ask(process: subprocess.Popen[str], case: int) -> float:
    """Milliseconds of a case, now."""
    assert process.stdin is not None and process.stdout is not None
    print(case, file=process.stdin, flush=True)
    answer = float(process.stdout.readline())
    time.sleep(_SETTLE)
    return answer


def main() -> None:
    """Compare and print."""
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    both = [start(path.resolve(), options.cases, options.threads) for path in (options.before, options.after)]
    for number, case in enumerate(options.cases):
        times: list[tuple[float, float]] = []
        for turn in range(options.rounds):
            first, second = both if turn % 2 == 0 else both[::-1]
            pair = ask(first, number), ask(second, number)
            times.append(pair if turn % 2 == 0 else pair[::-1])
        before, after = (statistics.median(side) for side in zip(*times, strict=True))
        ratio = statistics.median(old / new for old, new in times)
        print(f"{case}: {before:.3f} ms before, {after:.3f} after, ratio {ratio:.3f}", flush=True)
    for process in both:
        process.communicate()  # at the end of its input it goes
    return None


if __name__ == "__main__":
    main()
