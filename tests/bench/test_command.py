"""``pytest bench/`` and ``pytest bench/ --benchmark``, as they are typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases import GROUPS
from bench.results import Results

ROOT = Path(__file__).resolve().parents[2]


def _pytest(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_measures_and_writes(tmp_path: Path):
    file = tmp_path / "results.json"
    options = ("--benchmark", "--seconds", 0.01, "--threads", 1, "--results", file)
    result = _pytest("bench/", *options, "--groups", "block", "-k", "512-4-1-0.2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cells: 1; threads: 1; about 0.0 minutes" in result.stdout
    assert "geomean efficiency" in result.stdout
    assert "Legend" not in result.stdout  # pytest-benchmark's own table
    results = Results.load(file)
    assert results.machine["threads"] == 1
    assert {"onnxruntime", "openvino"} <= results.versions.keys()
    (cell,) = results.cells
    assert (cell.group, cell.rounds, cell.baseline) == ("block", 15, "prepacked")
    assert cell.name == "bench/test_block.py::test_block[512-4-1-0.2-exact-float32-warm]"
    assert cell.kept == pytest.approx(0.2, abs=0.01)
    assert cell.efficiency == pytest.approx(cell.speedup[0] * cell.kept, rel=1e-4)


def test_without_the_flag_nothing_is_measured(tmp_path: Path):
    file = tmp_path / "results.json"
    result = _pytest("bench/", "--results", file, "--groups", "block", "-k", "512-4-1-0.2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout and "geomean" not in result.stdout
    assert not file.exists()


def test_groups_are_chosen():
    result = _pytest("bench/", "--groups", "masks,cold", "--collect-only", "-k", "64-32-16")
    listed = [line for line in result.stdout.splitlines() if "::" in line]
    assert listed and all("::test_masks[" in line or "::test_cold[" in line for line in listed)
    assert {line.partition("::")[2].partition("[")[0] for line in listed} == {"test_masks", "test_cold"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--groups", "blocks"), f"--groups must name some of {', '.join(GROUPS)}, got blocks"),
        (("--threads", 0), "--threads must be positive, got 0"),
    ],
)
def test_wrong_options(options, said):
    result = _pytest("bench/", *options)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in result.stderr


def test_no_number_on_red(tmp_path: Path):
    file, plugin = tmp_path / "results.json", tmp_path / "wrong.py"
    plugin.write_text(
        "import bench.trials\n"
        "right = bench.trials.gated_conv2d\n"
        "bench.trials.gated_conv2d = lambda *a, **o: right(*a, **o) + 0.01\n"
    )
    (tmp_path / "test_wrong.py").write_text(
        f"import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('wrong', {str(plugin)!r})\n"
        f"spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    chosen = "(512-7-1-0.2-contiguous and gated_conv2d) or 512-4-1-0.2 or test_wrong"
    options = ("--benchmark", "--seconds", 0.01, "--results", file, "--groups", "functional,block", "-k", chosen)
    result = _pytest("bench/", tmp_path / "test_wrong.py", *options)
    assert result.returncode == 1
    assert "No results: something failed" in result.stdout
    assert "geomean" not in result.stdout and not file.exists()
