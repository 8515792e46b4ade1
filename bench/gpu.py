"""The GPU benchmark in one command: ``python -m bench.gpu [--out FOLDER] [PART ...]``, from the root of a checkout.

It needs that checkout and a python with PyTorch, Triton, rich and pytest: no network, no installation, no compiled
library; where the libraries lie beside the package (``python setup.py build_ext --inplace``) the CUDA kernels are
tested too. What is measured is written after every case, so that a run that is cut short has lost nothing; where a
kernel takes the device from its process, a new one goes on with the next case.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu_checks
from bench.gpu_cases import BLOCKS, CONVOLUTIONS, NETWORKS, SCHEDULED, SMALL_BATCHES, TUNED
from bench.gpu_checks import PROCESSES, ROOT
from bench.gpu_plot import plots
from bench.gpu_slimmable import SLICED, SLIMMABLE, sliced_ways, slimmable_ways
from bench.gpu_time import measure
from bench.gpu_trials import (
    TunedBlock,
    Way,
    backward_ways,
    block_ways,
    ceilings,
    conv_ways,
    network_ways,
    schedule_ways,
)
from bench.results import Results
from gatedkernels.reporting.machine import versions

_COMPILE_SECONDS = 180  # then the measurements begin, whether or not all is compiled
_AGREEMENT = 0.02  # between two results in bfloat16


class Row(NamedTuple):
    """A case served in one way, milliseconds.

    Attributes:
        part: Of the benchmark.
        facts: The case's fields.
        way: How it was served.
        ms: Median, lower and upper quartile.
        speedup: Of the fastest dense way over this one; None without a dense way.
        note: An error, or what else the case has to say.
    """

    part: str
    facts: dict[str, Any]
    way: str
    ms: list[float]
    speedup: float | None = None
    note: str = ""


def rows_of(part: str, facts: dict[str, Any], ways: Iterator[Way], agree: bool = True) -> list[Row]:
    """Measure every way through a case. One that fails is a row that says why: the others are worth having.

    Unless they are different things (``agree``), the ways that are not dense must have one result.
    """
    rows, dense, exact = [], [], None
    try:
        for way in ways:
            try:
                result = None if way.dense or not agree else way.calls[0]()
                if isinstance(result, torch.Tensor):
                    exact = result if exact is None else exact
                    refuse(result, exact)
                timing = measure(way.calls)
            except Exception as error:
                rows.append(Row(part, facts, way.name, [], note=f"{type(error).__name__}: {error}"[:300]))
                if is_lost():
                    break
                continue
            rows.append(Row(part, facts, way.name, [1000 * seconds for seconds in timing]))
            dense += [rows[-1].ms[0]] if way.dense else []
    except Exception as error:  # the inputs could not be made: no memory, say
        rows.append(Row(part, facts, "inputs", [], note=f"{type(error).__name__}: {error}"[:300]))
    if not dense:
        return rows
    return [row._replace(speedup=min(dense) / row.ms[0]) if row.ms else row for row in rows]


def refuse(result: torch.Tensor, exact: torch.Tensor) -> None:
    """Raise ``ValueError`` for a wrong result: the gated ways through a case compute the same."""
    error = float((result.float() - exact.float()).norm() / exact.float().norm())
    if not error <= _AGREEMENT:  # NaN fails too
        raise ValueError(f"result must agree with the first gated way's to {_AGREEMENT}, got an error of {error:.3g}")


# A part: the folder of results, whether to be small, and the first case, in; the rows of each case out.
Part = Callable[[Path, bool, int], Iterator[list[Row]]]


def _checks(part: str, check: Callable[[Path], str]) -> Part:
    def run(out: Path, small: bool, first: int) -> Iterator[list[Row]]:
        if not small and not first:
            yield [Row(part, {}, "pytest", [], note=check(out))]

    return run


def run_ceilings(out: Path, small: bool, first: int) -> Iterator[list[Row]]:
    """What the chip can do."""
    for name, amount, unit, call in islice(ceilings(device(), small), first, None):
        row = rows_of("ceilings", {"what": name}, iter([Way(name, False, [call] * 4)]))[0]
        yield [row._replace(note=f"{1000 * amount / row.ms[0]:.4g} {unit}" if row.ms else row.note)]


def run_convolutions(out: Path, small: bool, first: int) -> Iterator[list[Row]]:
    """What cuDNN makes of the dense convolutions, as a part of what the chip can do."""
    for case in islice(CONVOLUTIONS, first, 1 if small else None):
        chosen = case.small() if small else case
        rows = rows_of("cudnn", chosen.facts(), conv_ways(chosen, device()), agree=False)
        rates = (f"{2e-9 * chosen.multiply_adds / row.ms[0]:.4g} TFLOP/s" if row.ms else row.note for row in rows)
        yield [row._replace(note=rate) for row, rate in zip(rows, rates, strict=True)]


def run_tuning(out: Path, small: bool, first: int) -> Iterator[list[Row]]:
    """What `gatedkernels.tune` finds for the blocks' convolutions; ``tiles.json`` holds it, for nobody else."""
    from gatedkernels.store import FOLDER_VARIABLE
    from gatedkernels.tuning import tune

    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(out)
    try:
        for case in islice(TUNED, first, 1 if small else None):
            chosen = case.small() if small else case
            try:
                block = TunedBlock(chosen, device())
                found = tune(block, block.x)
            except Exception as error:
                note = f"{type(error).__name__}: {error}"[:300]
                yield [Row("tuning", chosen.facts(), "tune", [], note=note)]
                continue
            yield [
                Row("tuning", {"shape": each.key}, str(tuple(each.configuration)), 3 * [each.milliseconds],
                    each.shipped / each.milliseconds, f"over the shipped one; {each.measured} tried")
                for each in found
            ]  # fmt: skip
    finally:
        os.environ.pop(FOLDER_VARIABLE) if before is None else os.environ.update({FOLDER_VARIABLE: before})
        _forget_tiles()


def _forget_tiles() -> None:
    """What was just measured is not to serve the parts that follow."""
    if importlib.util.find_spec("triton") is not None:
        from gatedkernels.ops.ragged import launch

        launch.forget()


class Blocks(NamedTuple):
    """A part that takes cases through all of their ways."""

    part: str
    cases: Sequence[Any]
    ways: Callable[..., Iterator[Way]]
    compiled: bool = False
    agree: bool = True

    def __call__(self, out: Path, small: bool, first: int) -> Iterator[list[Row]]:
        """Rows of every case from the ``first`` on."""
        options = {"compiled": True} if self.compiled else {}
        for case in islice(self.cases, first, 1 if small else None):
            chosen = case.small() if small else case
            yield rows_of(self.part, chosen.facts(), self.ways(chosen, device(), **options), self.agree)


_EVERY_SHAPE = tuple(case for case in BLOCKS if case.kept == 0.3 and case.masks == "independent")
_LARGE_NETWORKS = tuple(case for case in NETWORKS if (case.size, case.batch) == (224, 256))
_OF_BLOCKS = (
    Blocks("blocks", BLOCKS, block_ways),
    Blocks("small", SMALL_BATCHES, block_ways),
    Blocks("schedules", SCHEDULED, schedule_ways),
    Blocks("backward", _EVERY_SHAPE, backward_ways),
    Blocks("networks", NETWORKS, network_ways),
    Blocks("sliced", SLICED, sliced_ways),
    # In bfloat16, folded normalisations and others differ by as much as wrong results would.
    Blocks("slimmable", SLIMMABLE, slimmable_ways, agree=False),
)
# Minutes of compilation, which nothing spreads.
_LONG_BLOCKS = (
    Blocks("compiled", _EVERY_SHAPE, block_ways, compiled=True),
    Blocks("compiled-networks", _LARGE_NETWORKS, network_ways, compiled=True),
)
PARTS: dict[str, Part] = {
    "tests": _checks("tests", gpu_checks.tests),
    "ceilings": run_ceilings,
    "cudnn": run_convolutions,
    **{blocks.part: blocks for blocks in _OF_BLOCKS},
    "sanitizer": _checks("sanitizer", gpu_checks.sanitizer),
    "tuning": run_tuning,
    **{blocks.part: blocks for blocks in _LONG_BLOCKS},
}
LONG = ("sanitizer", "tuning", *(blocks.part for blocks in _LONG_BLOCKS))


def compile_ahead(parts: Sequence[str]) -> None:
    """Call every gated way of these parts once, in several processes: Triton keeps what it compiles on disk.

    What is not compiled in time is where it is measured.
    """
    jobs = [(blocks.part, index) for blocks in _OF_BLOCKS if blocks.part in parts for index in range(len(blocks.cases))]
    random.Random(0).shuffle(jobs)  # neighbours would compile the same at the same time
    with get_context("spawn").Pool(PROCESSES, torch.set_num_threads, (2,)) as pool:
        pool.starmap_async(call_once, jobs, chunksize=1).wait(_COMPILE_SECONDS)


def call_once(part: str, index: int) -> None:
    """Call every gated way of one case once. What fails is reported where it is measured."""
    blocks = next(blocks for blocks in _OF_BLOCKS if blocks.part == part)
    with torch.no_grad(), suppress(Exception):
        for way in blocks.ways(blocks.cases[index], device()):
            with suppress(Exception):
                _ = None if way.dense else way.calls[0]()
    if device() == "cuda":
        torch.cuda.empty_cache()


def device() -> str:
    """Where it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_lost() -> bool:
    """Whether a kernel's illegal access has cost this process its device."""
    try:
        if device() == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def go_on(out: Path, parts: Sequence[str], first: int, small: bool) -> int:
    """Measure the rest in a new process, which has the device again."""
    words = ["--out", str(out.resolve()), "--first", str(first), *(["--small"] if small else []), *parts]
    return subprocess.call([sys.executable, "-m", "bench.gpu", *words], cwd=ROOT)


def about() -> dict[str, Any]:
    """The machine, the versions, the commit."""
    here = Results.here([])
    machine = {"device": torch.cuda.get_device_name() if device() == "cuda" else "cpu", **here.machine}
    if device() == "cuda":
        found = torch.cuda.get_device_properties(0)
        machine |= {"multiprocessors": found.multi_processor_count, "cache": found.L2_cache_size}
    return {"machine": machine, "versions": versions("triton"), "commit": here.commit, "date": here.date}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| part | case | way | ms | quartiles | against the best dense way | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        case = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in row.facts.values())
        median, quartiles = (f"{row.ms[0]:.4g}", f"{row.ms[1]:.4g} … {row.ms[2]:.4g}") if row.ms else ("", "")
        speedup = "" if row.speedup is None else f"{row.speedup:.3f}"
        lines.append(f"| {row.part} | {case} | {row.way} | {median} | {quartiles} | {speedup} | {row.note} |")
    return "\n".join(lines)


def save(out: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write ``results.json`` and ``results.md``, each whole or not at all."""
    texts = {
        "results.json": json.dumps({**head, "rows": [row._asdict() for row in rows]}, indent=1) + "\n",
        "results.md": table(rows) + "\n",
    }
    for name, text in texts.items():
        (out / f"{name}.new").write_text(text)
        os.replace(out / f"{name}.new", out / name)


def stored(out: Path) -> list[Row]:
    """Rows that an earlier process wrote."""
    return [Row(**row) for row in json.loads((out / "results.json").read_text())["rows"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all (without {' and '.join(LONG)})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of results")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # where `go_on` goes on, with the rows in --out
    parser.add_argument("--small", action="store_true", help="the first case of each part, tiny: to see that it works")
    options = parser.parse_args(arguments)
    everything = [name for name in PARTS if name not in LONG]
    parts = everything if not options.parts or options.parts == ["all"] else options.parts
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if device() == "cpu" and not options.small:
        parser.error("needs a CUDA device; --small tries the script without one")
    torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    head, rows = about(), [] if options.first is None else stored(options.out)
    if not options.small and options.first is None and {blocks.part for blocks in _OF_BLOCKS} & set(parts):
        compile_ahead(parts)
    first = options.first or 0
    with torch.no_grad():
        for position, part in enumerate(parts):
            for done, found in enumerate(PARTS[part](options.out, options.small, first), first + 1):
                rows += found
                save(options.out, head, rows)
                print(table(found).split("\n", 2)[2], flush=True)
                if is_lost():
                    return go_on(options.out, parts[position:], done, options.small)
            first = 0
    for path in plots(rows, options.out):
        print(f"written to {path}")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
