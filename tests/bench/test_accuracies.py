"""Runs become a table: one row a method, means and deviations over seeds."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.accuracies import gather, main, table


def run(method: str, seed: int, **accuracy: float) -> dict[str, Any]:
    """What an evaluation leaves, with some accuracies by width."""
    rows = [
        {"width": float(width.removeprefix("w")), "accuracy": {"linear": value}, "random_init": {"linear": 0.1}}
        for width, value in accuracy.items()
    ]
    return {"method": method, "seed": seed, "accuracy": {"pixels": {"linear": 0.2}}, "widths": rows}


RUNS = [run("us3l", 0, w0=0.3, w1=0.4), run("us3l", 1, w0=0.5, w1=0.4), run("simclr", 0, w1=0.45), run("x", 0, w0=0.3)]


def test_table():
    lines = table(gather(RUNS, "linear")).splitlines()
    assert lines[0] == "| method | 0 | 1 |"
    assert lines[2:] == [
        "| us3l | 40.0 ± 14.1 (2) | 40.0 ± 0.0 (2) |",
        "| simclr |  | 45.0 |",
        "| x | 30.0 |  |",
        "| untrained | 10.0 ± 0.0 (2) | 10.0 ± 0.0 (2) |",
        "| raw pixels | 20.0 ± 0.0 (2) | 20.0 ± 0.0 (2) |",
    ]


def test_runs_of_two_tables_are_refused():
    with pytest.raises(ValueError, match=r"runs must differ in method, width or seed, got us3l at 1\.0 of seed 0"):
        gather([*RUNS, run("us3l", 0, w1=0.41)], "linear")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [tmp_path / str(number) for number in range(len(RUNS) + 1)]
    for folder, content in zip(folders, RUNS, strict=False):
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(content))
    main([*map(str, folders)])  # the last is no run yet
    assert "| simclr |  | 45.0 |" in capsys.readouterr().out
