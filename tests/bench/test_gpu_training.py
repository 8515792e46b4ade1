"""The runs side by side, tiny and one after the other."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_training
from gatedkernels import cli

TINY = (
    *("--data", "synthetic", "--limit", "24", "--image-size", "16", "--width", "0.0625", "--embedding", "8"),
    *("--batch-size", "12", "--lr", "0.01", "--device", "cpu"),
)


def one_by_one(calls: dict[str, list[str]], out: Path) -> None:
    """The command line in this process."""
    for words in calls.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gatedkernels", *words])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code


def test_two_runs_and_what_became_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu_training, "side_by_side", one_by_one)
    monkeypatch.setattr(gpu_training, "affordable", lambda folders, *given: 3 if given == (55.0, 5.0) else 4)
    monkeypatch.setattr("gatedkernels.training.evaluation.linear.EPOCHS", 2)
    times = iter([0.0, 5.0])
    options = [
        "--data-dir",
        str(tmp_path),
        "--seconds",
        "70",
        "--evaluation-seconds",
        "10",
        "--out",
        str(tmp_path / "out"),
    ]
    assert gpu_training.main([*options, "--", *TINY], clock=lambda: next(times)) == 0
    results = json.loads((tmp_path / "out" / "training.json").read_text())
    assert {"machine", "versions", "commit", "date", "commands", "runs"} == set(results)
    assert {name: run["epochs"] for name, run in results["runs"].items()} == {"vicreg-dual": 3, "vicreg": 3}
    assert set(results["runs"]["vicreg-dual"]["accuracy"]) == {"pixels", "random_init", "dense", "gated"}
    assert set(results["runs"]["vicreg"]["accuracy"]) == {"pixels", "random_init", "dense"}
    assert "--gate-warmup-epochs 3" in results["commands"]["vicreg"]
    assert json.loads((tmp_path / "out" / "masks.json").read_text())["gates"]
    shown = capsys.readouterr().out
    assert "3 epochs" in shown and "| VICReg-Dual, gated |" in shown


def test_the_slower_run_decides_how_many_epochs_there_are(monkeypatch: pytest.MonkeyPatch):
    progress = {"a": {"seconds": 10.0, "epochs": 2.0}, "b": {"seconds": 8.0, "epochs": 2.0}}
    monkeypatch.setattr(gpu_training.RunFolder, "read_progress", lambda folder: progress[folder.path.name])
    assert gpu_training.affordable({"one": Path("a"), "other": Path("b")}, 55.0, 13.0) == 10


def test_results_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu_training.main(["--data-dir", str(tmp_path), "--out", str(tmp_path)])
    assert "--out must be a new folder" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_training, "sys", SimpleNamespace(executable=str(tmp_path / "program")))
    (tmp_path / "program").write_text('#!/bin/sh\ntest "$3" = fails && exit 3\nexec sleep 600\n')
    (tmp_path / "program").chmod(0o755)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="wrong failed"):
        gpu_training.side_by_side({"right": ["waits"], "wrong": ["fails"]}, tmp_path)
    assert time.monotonic() - start < 60


def test_a_run_that_fails_is_shown(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"wrong failed: error: run must be the folder of a training run"):
        gpu_training.side_by_side({"right": ["--version"], "wrong": ["evaluate", str(tmp_path)]}, tmp_path)
    assert "gatedkernels" in (tmp_path / "right.log").read_text()


def test_the_schedule_is_the_papers_in_proportion():
    calls = gpu_training.commands(Path("images"), 50, [])
    assert calls["vicreg-dual"][-2:] == ["--bound-decay", "0.2"]
    assert calls["vicreg"][-2:] == ["--gate-warmup-epochs", "50"]
    assert all(words[words.index("--warmup-epochs") + 1] == "10" for words in calls.values())
