"""Judge: does it keep what it promises?  ``python -m bench.check [FILE]``.

A limit is missed only if the 95 % bootstrap upper bound of what it demands lies under it, three times in a row: then
it is hardly the machine's mood.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cases import LIMITS, Limit
from bench.results import Results, geomean
from bench.runner import Cell

_ROOT = Path(__file__).resolve().parent.parent
_REPEATS = 3
# Of a normal distribution 95 % lie below so many standard deviations.
_Z95 = 1.645


@dataclass(frozen=True)
class Verdict:
    """What became of a limit.

    Attributes:
        limit: The limit.
        what: The cell, or the group of cells that is judged as one.
        value: What was measured.
        high: Its upper bound, with 95 % confidence.
        names: The tests to run again if it is missed.
        below: How many cells surely lie below, of a limit that allows some.
    """

    limit: Limit
    what: str
    value: float
    high: float
    names: tuple[str, ...]
    below: int = 0

    @property
    def passes(self) -> bool:
        """Whether the limit may be kept."""
        return self.high >= self.limit.least

    def __str__(self) -> str:
        limit = self.limit
        measure = f"geomean {limit.measure}" if limit.geomean else limit.measure
        if limit.allowed:
            measure = f"{self.below} below, {limit.allowed} may be; {measure} of the next"
        bound = f"{measure} {self.value:.3f}, at most {self.high:.3f}, must reach {limit.least:.3f}"
        if self.passes:
            return f"ok   {self.what}: {bound}"
        return f"MISS {self.what}: {bound}: {1 - self.value / limit.least:.1%} short"


def judge(cells: Sequence[Cell], limits: Sequence[Limit] = LIMITS) -> list[Verdict]:
    """Compare cells with limits; limits on cells that were not measured say nothing."""
    verdicts = []
    for limit in limits:
        chosen = [cell for cell in cells if limit.means(cell.group, cell.facts)]
        if limit.geomean:
            verdicts += [_verdict(limit, f"{limit.group} ({len(chosen)} cells)", chosen)] if chosen else []
        elif limit.allowed:
            verdicts += _counted(limit, chosen)
        else:
            verdicts += [_verdict(limit, cell.name, [cell]) for cell in chosen]
    return verdicts


def _counted(limit: Limit, cells: Sequence[Cell]) -> list[Verdict]:
    """Judge the cell that decides whether more than the allowed ones lie below, if there are so many at all."""
    verdicts = sorted((_verdict(limit, cell.name, [cell]) for cell in cells), key=lambda verdict: verdict.high)
    if len(verdicts) <= limit.allowed:
        return []
    names = tuple(name for verdict in verdicts if not verdict.passes for name in verdict.names)
    what = f"{limit.group}, all but {limit.allowed}"
    return [replace(verdicts[limit.allowed], what=what, names=names, below=len(names))]


def _verdict(limit: Limit, what: str, cells: Sequence[Cell]) -> Verdict:
    factors = [cell.kept if limit.measure == "efficiency" else 1.0 for cell in cells]
    value = geomean([cell.speedup[0] * factor for cell, factor in zip(cells, factors, strict=True)])
    names = tuple(cell.name for cell in cells)
    if len(cells) == 1:
        return Verdict(limit, what, value, cells[0].speedup[2] * factors[0], names)
    # Cells err independently: the variances of their logarithms add up.
    deviations = [math.log(cell.speedup[2] / cell.speedup[1]) / (2 * _Z95) for cell in cells]
    deviation = math.sqrt(sum(d * d for d in deviations)) / len(cells)
    return Verdict(limit, what, value, value * math.exp(_Z95 * deviation), names)


def _measure(names: Sequence[str], options: Sequence[str]) -> list[Cell]:
    """Run tests in a process of their own and return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark", "--results", str(file), *options, *names]
        if subprocess.run(command, cwd=_ROOT, check=False).returncode != 0:
            raise SystemExit("error: the benchmarks did not pass, and numbers of what is wrong mean nothing")
        return Results.load(file).cells


def _measure_and_judge(options: Sequence[str]) -> tuple[list[Verdict], list[Verdict]]:
    """Measure everything, and up to twice more what misses its limit; return all verdicts and the misses."""
    verdicts = judge(_measure(["bench"], options))
    missed = [verdict for verdict in verdicts if not verdict.passes]
    for _ in range(_REPEATS - 1):
        if not missed:
            break
        print(f"{len(missed)} of {len(verdicts)} limits missed, measured again:", *missed, sep="\n", flush=True)
        keys = {(verdict.limit, verdict.what) for verdict in missed}
        names = sorted({name for verdict in missed for name in verdict.names})
        again = judge(_measure(names, options))
        missed = [verdict for verdict in again if not verdict.passes and (verdict.limit, verdict.what) in keys]
    return verdicts, missed


def _options(arguments: argparse.Namespace) -> list[str]:
    """What is passed on to pytest."""
    given = {name: getattr(arguments, name) for name in ("groups", "threads", "seconds")}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def main() -> None:
    """Measure and judge, up to three times what misses its limit; or judge a file of results as it is."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="file of results; without one, everything is measured")
    groups = ",".join(dict.fromkeys(limit.group for limit in LIMITS))
    parser.add_argument("--groups", default=groups, help="groups to measure, separated by commas (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads to compute with (PyTorch's setting)")
    parser.add_argument("--seconds", type=float, help="seconds to measure each case")
    arguments = parser.parse_args()
    if arguments.file is not None:
        try:
            verdicts = judge(Results.load(arguments.file).cells)
        except ValueError as error:
            parser.error(str(error))
        missed = [verdict for verdict in verdicts if not verdict.passes]
    else:
        verdicts, missed = _measure_and_judge(_options(arguments))
    if not verdicts:
        raise SystemExit("error: the results hold no cell that a limit speaks of")
    judged = {verdict.limit for verdict in verdicts}
    silent = [f"not judged, no such cells: {limit}" for limit in LIMITS if limit not in judged]
    together = [verdict for verdict in verdicts if verdict.passes and (verdict.limit.geomean or verdict.limit.allowed)]
    print(*silent, *together, *missed, f"{len(verdicts) - len(missed)} of {len(verdicts)} limits kept", sep="\n")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
