"""Files of results, their tables and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, results
from bench.results import Results, geomean


@pytest.fixture
def found(make_cell) -> Results:
    shape = {"channels": 64, "size": 32, "masks": "exact"}
    cells = [
        make_cell("block", (4.0, 3.9, 4.1), 0.2, density=0.2, **shape),
        make_cell("block", (1.0, 0.9, 1.1), 1.0, density=1.0, **shape),
        make_cell("network", (2.5, 2.4, 2.6), 0.3),
    ]
    return Results.here(cells)


def test_round_trip(found: Results, tmp_path: Path):
    path = found.save(tmp_path / "results.json")
    assert Results.load(path) == found
    content = json.loads(path.read_text())
    assert content.keys() == {"machine", "versions", "commit", "date", "cells"}
    assert content["machine"].keys() == {"processor", "threads", "instruction_set"}
    assert content["cells"][0]["efficiency"] == 0.8


def test_default_name_holds_machine_and_date(found: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    path = found.save()
    assert path.parent == tmp_path
    assert path.name.endswith(f"-{found.machine['threads']}t-{found.date.replace(':', '')}.json")
    assert results.latest() == path


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": [{"group": "block"}]}'])
def test_bad_files(content: str, tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"path must be a file of benchmark results, got .*results\.json"):
        Results.load(path)


def test_geomean():
    assert geomean([0.5, 2.0]) == pytest.approx(1)


def test_markdown(found: Results):
    text = report.markdown(found)
    assert "| block | 2 | 2.00× | 0.894 | 0.800 |" in text
    assert "| 0.200 | 4.000 | 1.000 (1.000 … 1.000) | 4.00× (3.90 … 4.10) | 0.800 | prepacked |" in text
    assert found.commit in text and found.versions["torch"] in text


def test_pictures(found: Results, tmp_path: Path):
    pytest.importorskip("matplotlib")
    files = report.plots(found, tmp_path / "results")
    assert [path.name for path in files] == ["results-block-n1.png", "results-network-n1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_report_from_the_command_line(found: Results, tmp_path: Path, pytestconfig: pytest.Config):
    pytest.importorskip("matplotlib")
    path = found.save(tmp_path / "results.json")
    command = [sys.executable, "-m", "bench.report", str(path)]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    assert "geomean" in result.stdout
    assert (tmp_path / "results.md").read_text() == report.markdown(found) + "\n"
