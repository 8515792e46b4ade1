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
from dataclasses import dataclass
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
        what: The cell, or the group whose geometric mean it is.
        value: What was measured.
        high: Its upper bound, with 95 % confidence.
        names: The tests that measured it.
    """

    limit: Limit
    what: str
    value: float
    high: float
    names: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether the limit may be kept."""
        return self.high >= self.limit.least

    def __str__(self) -> str:
        sign = "ok  " if self.passes else "MISS"
        mean = "geomean " if self.limit.geomean else ""
        bound = f"{self.value:.3f}, at most {self.high:.3f}"
        return f"{sign} {self.what}: {mean}{self.limit.measure} {bound}, must reach {self.limit.least:.3f}"


def judge(cells: Sequence[Cell], limits: Sequence[Limit] = LIMITS) -> list[Verdict]:
    """Compare cells with limits; limits on cells that were not measured say nothing."""
    verdicts = []
    for limit in limits:
        chosen = [cell for cell in cells if cell.group == limit.group and _is_meant(cell, limit)]
        if not limit.geomean:
            verdicts += [_verdict(limit, cell.name, [cell]) for cell in chosen]
        elif chosen:
            verdicts.append(_verdict(limit, f"{limit.group} ({len(chosen)} cells)", chosen))
    return verdicts


def _is_meant(cell: Cell, limit: Limit) -> bool:
    return all(cell.facts[name] == value for name, value in limit.only)


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


def _measure(names: Sequence[str]) -> list[Cell]:
    """Run tests in a process of their own and return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark", "--results", str(file), *names]
        if subprocess.run(command, cwd=_ROOT, check=False).returncode != 0:
            raise SystemExit("error: the benchmarks did not pass, and numbers of what is wrong mean nothing")
        return Results.load(file).cells


def main() -> None:
    """Measure and judge, up to three times what misses its limit; or judge a file of results as it is."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="file of results; without one, everything is measured")
    path = parser.parse_args().file
    if path is not None:
        try:
            verdicts = judge(Results.load(path).cells)
        except ValueError as error:
            parser.error(str(error))
        missed = [verdict for verdict in verdicts if not verdict.passes]
    else:
        verdicts = judge(_measure(["bench", "-k", "not test_masks"]))
        missed = [verdict for verdict in verdicts if not verdict.passes]
        for _ in range(_REPEATS - 1):
            if not missed:
                break
            print(f"{len(missed)} of {len(verdicts)} limits missed, measured again:", *missed, sep="\n", flush=True)
            keys = {(verdict.limit, verdict.what) for verdict in missed}
            again = judge(_measure(sorted({name for verdict in missed for name in verdict.names})))
            missed = [verdict for verdict in again if not verdict.passes and (verdict.limit, verdict.what) in keys]
    if not verdicts:
        raise SystemExit("error: the results hold no cell that a limit speaks of")
    print(*missed, f"{len(verdicts) - len(missed)} of {len(verdicts)} limits kept", sep="\n")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
