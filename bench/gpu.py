"""The GPU benchmark in one command: ``python -m bench.gpu [--out FOLDER] [PART ...]``, from the root of a checkout.

It needs that checkout and a python with PyTorch, Triton, rich and pytest: no network, no installation, no compiled
library; where the libraries lie beside the package (``python setup.py build_ext --inplace``) the CUDA kernels are
tested too. What is measured is written after every case, so that a run that is cut short has lost nothing.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu_cases import BLOCKS, CONVOLUTIONS, NETWORKS, SCHEDULED, SMALL_BATCHES, TUNED
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

ROOT = Path(__file__).resolve().parents[1]
TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        *("triton_kernels", "triton_operators", "triton_schedules", "triton_cuda"),
        *("gate_kernels", "switch_kernels", "sliced_kernels", "similar_kernels", "cuda"),
    )
)
# Of these, launches of every kind that are small and soon compiled.
_SANITIZED = "stable_sort or (within_budget and float32 and contiguous) or any_geometry or all_open_and_all_closed"
_SANITIZER_SECONDS = 300
_PROCESSES = "8"  # that compile kernels at the same time
_ENDED = re.compile(r" in \d+\.\d+s")  # pytest's last line

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


def run_tests(out: Path, small: bool) -> Iterator[list[Row]]:
    """The kernels' tests on the device, in several processes where pytest-xdist is; the log is ``tests.log``."""
    if small:
        return
    parallel = ["-n", _PROCESSES] if importlib.util.find_spec("xdist") else []
    yield [Row("tests", {}, "pytest", [], note=_pytest([*parallel, *TESTS], out / "tests.log"))]


def run_sanitizer(out: Path, small: bool) -> Iterator[list[Row]]:
    """Some of them under CUDA's compute-sanitizer, if it is here; the log is ``sanitizer.log``.

    PyTorch's allocator hands out parts of large pieces of memory, within which no access is an error: it is left out.
    """
    if small:
        return
    program = shutil.which("compute-sanitizer")
    note = "compute-sanitizer is not on the PATH"
    if program is not None:
        under = [program, "--tool", "memcheck", "--error-exitcode", "1"]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        note = _pytest(["-k", _SANITIZED, *TESTS], out / "sanitizer.log", under, environment, _SANITIZER_SECONDS)
        errors = [line for line in (out / "sanitizer.log").read_text().splitlines() if "ERROR SUMMARY" in line]
        note = "; ".join([note, *errors])
    yield [Row("sanitizer", {}, "pytest", [], note=note)]


def _pytest(
    words: Sequence[str],
    log: Path,
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Run tests, and return the last line of what they say. Other versions' warnings are no errors here."""
    command = [*under, sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *words]
    with log.open("w") as file:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout} s"
    return next((line for line in reversed(log.read_text().splitlines()) if _ENDED.search(line)), "no output")


def run_ceilings(out: Path, small: bool) -> Iterator[list[Row]]:
    """What the chip can do."""
    for name, amount, unit, call in ceilings(device(), small):
        row = rows_of("ceilings", {"what": name}, iter([Way(name, False, [call] * 4)]))[0]
        yield [row._replace(note=f"{1000 * amount / row.ms[0]:.4g} {unit}" if row.ms else row.note)]


def run_convolutions(out: Path, small: bool) -> Iterator[list[Row]]:
    """What cuDNN makes of the dense convolutions, as a part of what the chip can do."""
    for case in islice(CONVOLUTIONS, 1 if small else None):
        chosen = case.small() if small else case
        rows = rows_of("cudnn", chosen.facts(), conv_ways(chosen, device()), agree=False)
        rates = (f"{2e-9 * chosen.multiply_adds / row.ms[0]:.4g} TFLOP/s" if row.ms else row.note for row in rows)
        yield [row._replace(note=rate) for row, rate in zip(rows, rates, strict=True)]


def run_tuning(out: Path, small: bool) -> Iterator[list[Row]]:
    """What `gatedkernels.tune` finds for the blocks' convolutions; ``tiles.json`` holds it, for nobody else."""
    from gatedkernels.store import FOLDER_VARIABLE
    from gatedkernels.tuning import tune

    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(out)
    try:
        for case in islice(TUNED, 1 if small else None):
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


def _blocks(
    part: str, cases: Sequence[Any], ways: Callable[..., Iterator[Way]], **options: bool
) -> Callable[[Path, bool], Iterator[list[Row]]]:
    def run(out: Path, small: bool) -> Iterator[list[Row]]:
        for case in islice(cases, 1 if small else None):
            chosen = case.small() if small else case
            yield rows_of(part, chosen.facts(), ways(chosen, device(), **options))

    return run


_EVERY_SHAPE = tuple(case for case in BLOCKS if case.kept == 0.3 and case.masks == "independent")
PARTS: dict[str, Callable[[Path, bool], Iterator[list[Row]]]] = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "ceilings": run_ceilings,
    "cudnn": run_convolutions,
    "blocks": _blocks("blocks", BLOCKS, block_ways),
    "small": _blocks("small", SMALL_BATCHES, block_ways),
    "schedules": _blocks("schedules", SCHEDULED, schedule_ways),
    "backward": _blocks("backward", _EVERY_SHAPE, backward_ways),
    "networks": _blocks("networks", NETWORKS, network_ways),
    "sliced": _blocks("sliced", SLICED, sliced_ways),
    "slimmable": _blocks("slimmable", SLIMMABLE, slimmable_ways),
    # Minutes of compilation.
    "tuning": run_tuning,
    "compiled": _blocks("compiled", _EVERY_SHAPE, block_ways, compiled=True),
    "compiled-networks": _blocks(
        "compiled-networks", tuple(c for c in NETWORKS if (c.size, c.batch) == (224, 256)), network_ways, compiled=True
    ),
}

LONG = ("tuning", "compiled", "compiled-networks")


def device() -> str:
    """Where it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all (without {' and '.join(LONG)})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of results")
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
    head, rows = about(), []
    with torch.no_grad():
        for part in parts:
            for found in PARTS[part](options.out, options.small):
                rows += found
                save(options.out, head, rows)
                print(table(found).split("\n", 2)[2], flush=True)
    for path in plots(rows, options.out):
        print(f"written to {path}")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
