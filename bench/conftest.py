"""``pytest bench/ --benchmark`` measures; without the flag every case runs once, small, to see that it works."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.report import markdown
from bench.results import Results
from bench.runner import Cell, make_cell, measure, try_once
from bench.trials import Trial

_CELLS: pytest.StashKey[list[Cell]] = pytest.StashKey()

Measure = Callable[[str, Any, Trial], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what ``bench`` adds to pytest."""
    group = parser.getgroup("gatedkernels")
    group.addoption("--benchmark", action="store_true", help="Measure; else only see that the cases run.")
    group.addoption("--results", type=Path, help="File for the results (bench/results/<machine>-<date>.json).")
    group.addoption("--seconds", type=float, default=1.2, help="Seconds to measure each case, about (%(default)s).")


def pytest_configure(config: pytest.Config) -> None:
    """Print our table, not pytest-benchmark's, which knows no baseline."""
    config.stash[_CELLS] = []
    config.option.benchmark_quiet = True


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Any:
    """The case, small unless it is measured."""
    return request.param if request.config.getoption("benchmark") else request.param.small()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Measure:
    """Measure a trial and note its cell, or without ``--benchmark`` run it once."""

    def run_once(group: str, case: Any, trial: Trial) -> None:
        try_once(trial)

    def run_measured(group: str, case: Any, trial: Trial) -> None:
        benchmark = request.getfixturevalue("benchmark")
        timed = measure(trial, benchmark, request.config.getoption("seconds"))
        cell = make_cell(group, request.node.nodeid, case.facts(), trial.kept, *timed)
        benchmark.extra_info.update(speedup=cell.speedup[0], efficiency=cell.efficiency)
        request.config.stash[_CELLS].append(cell)

    return run_measured if request.config.getoption("benchmark") else run_once


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the table and write the file; no number where anything failed."""
    cells = config.stash[_CELLS]
    if not cells:
        return
    if exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line(
            "No results: something failed, and numbers of what is wrong mean nothing.", red=True
        )
        return
    results = Results.here(cells)
    terminalreporter.write_line("")
    terminalreporter.write_line(markdown(results))
    terminalreporter.write_line(f"\nWritten to {results.save(config.getoption('results'))}")
