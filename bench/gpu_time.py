"""Time on a device: CUDA graphs over rotating inputs; on the CPU, for tests of the benchmark itself, a clock."""

import time
from collections.abc import Callable, Sequence

import torch

from gatedkernels.reporting.timing import Timing

Call = Callable[[], object]
_WARMUP, _REPLAYS = 3, 15
# Bytes that inputs in rotation should have together: several times the second-level cache.
ROTATION_BYTES, MOST_SETS = 256 << 20, 16


def sets_for(bytes_of_one: int) -> int:
    """How many sets of inputs to rotate."""
    return max(2, min(MOST_SETS, -(-ROTATION_BYTES // max(bytes_of_one, 1))))


def measure(calls: Sequence[Call], replays: int = _REPLAYS) -> Timing:
    """Seconds of one call, where ``calls`` are the same work on different inputs.

    On a GPU they are captured in one graph, whose replays are timed by events: what launching costs is not in it.
    """
    if not torch.cuda.is_available():
        return Timing.of([_clocked(call) for call in calls])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(_WARMUP):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(end) / 1000 / len(calls) for start, end in events])


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
