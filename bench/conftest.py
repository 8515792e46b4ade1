"""``pytest bench/ --benchmark`` measures; without the flag every case runs once, small, to see that it works."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import GROUPS, ON_REQUEST, SECONDS_BESIDE
from bench.report import markdown
from bench.results import Results
from bench.runner import Cell, make_cell, measure, try_once
from bench.trials import Trial

_CELLS: pytest.StashKey[list[Cell]] = pytest.StashKey()

Measure = Callable[[Any, Trial], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what ``bench`` adds to pytest."""
    group = parser.getgroup("gatedkernels")
    group.addoption("--benchmark", action="store_true", help="Measure; else only see that the cases run.")
    group.addoption("--results", type=Path, help="File for the results (bench/results/<machine>-<date>.json).")
    group.addoption("--seconds", type=float, default=1.0, help="Seconds to measure each case, about (%(default)s).")
    group.addoption("--groups", help=f"Groups of cases, separated by commas (all but {', '.join(ON_REQUEST)}).")
    group.addoption("--threads", type=int, help="Threads to compute with (PyTorch's setting).")


def pytest_configure(config: pytest.Config) -> None:
    """Check the options, and print our table, not pytest-benchmark's, which knows no baseline."""
    config.stash[_CELLS] = []
    config.option.benchmark_quiet = True
    wrong = [name for name in _groups(config) if name not in GROUPS]
    if wrong:
        raise pytest.UsageError(f"--groups must name some of {', '.join(GROUPS)}, got {', '.join(wrong)}")
    threads = config.getoption("threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads must be positive, got {threads}")
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of other groups than those that ``--groups`` names."""
    chosen = _groups(config)
    others = [item for item in items if _group(item) in GROUPS.keys() - set(chosen)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Say how long it will take, before it does."""
    if not config.getoption("benchmark"):
        return None
    groups = [group for group in map(_group, items) if group in GROUPS]
    seconds = sum(SECONDS_BESIDE[group] + config.getoption("seconds") for group in groups)
    return f"cells: {len(groups)}; threads: {torch.get_num_threads()}; about {seconds / 60:.1f} minutes"


def _groups(config: pytest.Config) -> list[str]:
    chosen = config.getoption("groups")
    if chosen is not None:
        return chosen.split(",")
    return [group for group in GROUPS if not (config.getoption("benchmark") and group in ON_REQUEST)]


def _group(item: pytest.Item) -> str:
    """The group of a case, from the name of its test; no group for what is not a benchmark."""
    in_bench = item.path.parent == Path(__file__).parent and isinstance(item, pytest.Function)
    return item.originalname.removeprefix("test_") if in_bench else ""


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Any:
    """The case, small unless it is measured."""
    return request.param if request.config.getoption("benchmark") else request.param.small()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Measure:
    """Measure a trial and note its cell, or without ``--benchmark`` run it once."""

    def run_once(case: Any, trial: Trial) -> None:
        try_once(trial)

    def run_measured(case: Any, trial: Trial) -> None:
        benchmark = request.getfixturevalue("benchmark")
        measured = measure(trial, benchmark, request.config.getoption("seconds"))
        cell = make_cell(_group(request.node), request.node.nodeid, case.facts(), trial, measured)
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
