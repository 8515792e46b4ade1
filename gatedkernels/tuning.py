"""Measure which tiles and schedules the Triton convolutions of a model run fastest with, on this GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gatedkernels import policy
from gatedkernels._checks import check_module
from gatedkernels.reporting.timing import Timing

Call = Callable[[], None]
Timer = Callable[[Call], float]

_MARGIN = 0.97  # a configuration replaces another where it is faster by more than what a median errs
_CALLS, _REPLAYS = 10, 15


class Tuned(NamedTuple):
    """What was measured for a shape of convolution.

    Attributes:
        key: The shape, in words.
        configuration: The fastest of those that were measured: a tile, splits of the reduction, and programs.
        milliseconds: Of that.
        shipped: Milliseconds of the shipped configuration.
        measured: How many were.
        failed: How many of these could not be compiled or launched.
    """

    key: str
    configuration: Any
    milliseconds: float
    shipped: float
    measured: int
    failed: int

    def __str__(self) -> str:
        tile, splits, programs = self.configuration
        schedule = f", {splits} splits" if splits > 1 else f", {programs} programs" if programs else ""
        return (
            f"{self.key}: {self.milliseconds:.4f} ms instead of {self.shipped:.4f} by "
            f"{tile.rows}x{tile.channels}x{tile.depth}, {tile.warps} warps, {tile.stages} stages{schedule}"
        )


def tune(
    model: nn.Module,
    example: Any,
    *,
    progress: Callable[[str], None] | None = None,
    timer: Timer | None = None,
) -> list[Tuned]:
    """Measure tiles and schedules for every shape of Triton convolution in a model, store the fastest, and use them.

    The model runs once. Each of its convolutions is measured where it is met, with the example's own masks: first other
    tiles, then numbers of warps and stages, then schedules, each with the best found before. What was measured is kept
    after every shape, in ``tiles.json`` beside the thresholds of ``gatedkernels.calibrate``, for this GPU and these
    versions. Nothing is ever measured but here. Compiling takes minutes for a network.

    Another tile adds numbers up in another order: results may differ in their last bits afterwards.

    Args:
        model: Called with the example; what ``gatedkernels.optimize`` returned, or anything else that runs on
            ``backend="triton"``.
        example: The input, or a tuple of them, on a CUDA device, of the batch size to tune for.
        progress: Called with a line for each shape.
        timer: Returns the seconds that a call takes; None: graphs on the device, measured by events.

    Returns:
        What was measured, one for each shape.

    Raises:
        TypeError: If the model is no module.
        RuntimeError: If there is no CUDA device, or the package triton is not installed.
        ValueError: If the example is not on a CUDA device, the model runs no Triton convolution, or a newer
            gatedkernels wrote the file.
        OSError: If the folder cannot be written.
    """
    check_module("model", model)
    inputs = example if isinstance(example, tuple) else (example,)
    device = _device(inputs, timer is not None)
    from gatedkernels.ops.ragged import launch, measured  # importing the package imports no Triton

    measured.TILES.check_writable()
    found: dict[str, Tuned] = {}

    def choose(shape: Any, run: Callable[[Any], None]) -> Any:
        key = shape.key()
        if key not in found:
            found[key] = _fastest(shape, run, measured.capability(device), timer or _events)
            measured.save(device, {key: found[key].configuration})  # what is measured stays, however it ends
            if progress:
                progress(str(found[key]))
        return found[key].configuration

    with _choosing(launch, choose), torch.no_grad():
        model(*inputs)
    if not found:
        raise ValueError("model must run convolutions on the backend 'triton' to be tuned, and it ran none")
    return list(found.values())


def path() -> Path:
    """The file of what was measured."""
    from gatedkernels.ops.ragged import measured

    return measured.TILES.path()


def _device(inputs: tuple[Any, ...], pretended: bool) -> torch.device:
    """Where the example is; with a timer of one's own, anywhere that Triton runs."""
    x = next((each for each in inputs if isinstance(each, torch.Tensor)), None)
    if x is None:
        raise ValueError(f"example must hold a tensor, got {', '.join(type(each).__name__ for each in inputs)}")
    if not pretended and not torch.cuda.is_available():
        raise RuntimeError("tune measures on a CUDA device, and PyTorch finds none")
    if not pretended and x.device.type != "cuda":
        raise ValueError(f"example must be on a CUDA device, got {x.device}")
    problem = policy.triton_problem(x)
    if problem is not None:
        raise RuntimeError(f"the backend 'triton' {problem}")
    return x.device


@contextmanager
def _choosing(launch: Any, choose: Callable[..., Any]) -> Iterator[None]:
    """Let ``choose`` decide; afterwards the table does again, as it then is."""
    launch.set_chooser(choose)
    try:
        yield
    finally:
        launch.set_chooser(None)
        launch.forget()


def _fastest(shape: Any, run: Callable[[Any], None], capability: tuple[int, int], timer: Timer) -> Tuned:
    """Try what there is, round by round."""
    from gatedkernels.ops.ragged.configurations import ROUNDS, configure

    chosen = configure(shape, capability)
    best = shipped = timer(lambda: run(chosen))
    measured, failed = {chosen}, 0
    for others in ROUNDS:
        for other in others(chosen, shape, capability):
            if other in measured:
                continue
            measured.add(other)
            seconds = _seconds(lambda other=other: run(other), timer)  # type: ignore[misc]
            failed += seconds is None
            if seconds is not None and seconds < _MARGIN * best:
                best, chosen = seconds, other
    return Tuned(shape.key(), chosen, 1000 * best, 1000 * shipped, len(measured), failed)


def _seconds(call: Call, timer: Timer) -> float | None:
    """How long a call takes; None if it is more than the chip has room for, or than the compiler can do."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return timer(call)
    except (CompilationError, OutOfResources, PTXASError):
        return None
    except RuntimeError as error:
        if "PassManager" not in str(error):  # all that a pass of the compiler says when it gives up
            raise
        return None


def _events(call: Call) -> float:
    """Seconds of a call: many in a graph, so that launching costs nothing; inputs stay in caches, as in a network."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have been compiled before
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    graph.replay()
    samples = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the timed one is launched while this runs
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1000 / _CALLS)
    return Timing.of(samples).median
