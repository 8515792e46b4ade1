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
    shape = {"channels": 64, "size": 32, "masks": "exact", "cache": "warm"}
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
    assert "| 0.200 | 4.000 | 1.000 (1.000 … 1.000) | 4.00× (3.90 … 4.10) | 0.800 | 1.00× | 4.00× | prepacked |" in text
    assert found.commit in text and found.versions["torch"] in text


def test_speed_up_is_algorithm_times_gating(make_cell):
    def block(speedup: float, density: float, group: str = "block", **facts):
        facts = {"channels": 64, "masks": "exact", "cache": "warm", "density": density, **facts}
        name = f"{group} {density} {facts['masks']} {facts['channels']}"
        return make_cell(group, (speedup,) * 3, density, name=name, **facts)

    cells = [
        block(1.2, 1.0),
        block(3.0, 0.3),
        block(2.4, 0.3, "masks", masks="correlated"),
        block(0.9, 1.0, "cold", cache="cold"),
        block(1.8, 0.3, "cold", cache="cold"),
        block(3.0, 0.3, channels=128),  # nobody measured it with every gate open
        block(1.1, 1.0, "functional", channels=256),
        block(2.0, 0.3, "functional", channels=256),
        make_cell("network", (1.1,) * 3, 1.0, name="open"),
        make_cell("network", (3.3,) * 3, 0.3, name="network"),
    ]
    parts = report.split(cells)
    assert parts == {
        "block 1.0 exact 64": (1.2, 1.0),
        "block 0.3 exact 64": (1.2, pytest.approx(2.5)),
        "masks 0.3 correlated 64": (1.2, pytest.approx(2.0)),
        "cold 1.0 exact 64": (0.9, 1.0),
        "cold 0.3 exact 64": (0.9, pytest.approx(2.0)),
        "open": (1.1, 1.0),
        "network": (1.1, pytest.approx(3.0)),
    }
    assert all(
        cell.speedup[0] == pytest.approx(parts[cell.name][0] * parts[cell.name][1])
        for cell in cells
        if cell.name in parts
    )
    text = report.markdown(Results.here(cells))
    assert "| 128 | 0.300 | 3.000 | 1.000 (1.000 … 1.000) | 3.00× (3.00 … 3.00) | 0.900 |  |  | prepacked |" in text


def test_ways_and_what_is_missing_are_listed(make_cell, tmp_path: Path):
    cell = make_cell("network", (2.5, 2.4, 2.6), 0.3)
    cell = cell._replace(ways_ms={"compiled": 4.0, "openvino": 3.5}, missing={"onnxruntime": "it is not installed"})
    found = Results.load(Results.here([cell]).save(tmp_path / "results.json"))
    text = report.markdown(found)
    assert "- batch 1, model net, size 32, dtype float32: openvino 3.50, compiled 4.00" in text
    assert "Not tried: onnxruntime (it is not installed)." in text


def test_pictures(found: Results, tmp_path: Path):
    pytest.importorskip("matplotlib")
    files = report.plots(found, tmp_path / "results")
    assert [path.name for path in files] == ["results-block-float32-n1.png", "results-network-float32-n1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_report_from_the_command_line(found: Results, tmp_path: Path, pytestconfig: pytest.Config):
    pytest.importorskip("matplotlib")
    path = found.save(tmp_path / "results.json")
    command = [sys.executable, "-m", "bench.report", str(path)]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    assert "geomean" in result.stdout
    assert (tmp_path / "results.md").read_text() == report.markdown(found) + "\n"
