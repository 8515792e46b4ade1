"""The command line, from words to files and messages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import gatedkernels as gk
from gatedkernels import cli, demo
from gatedkernels.training.config import OPTIONS, TrainConfig
from gatedkernels.training.evaluation import MEASURES, stored_masks
from gatedkernels.training.metrics_log import read_metrics
from gatedkernels.training.recipes import make_config

SMALL = [
    *("--data", "synthetic", "--limit", "64", "--image-size", "16", "--width", "0.0625", "--embedding", "8"),
    *("--epochs", "2", "--batch-size", "32", "--warmup-epochs", "1", "--lr", "0.02"),
]


def run(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command as a shell would and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["gatedkernels", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run("train", "vicreg-dual", "--run-dir", path, *SMALL, monkeypatch=monkeypatch) == 0
    return path


def latency_row(**values: Any) -> dict[str, Any]:
    row = {"device": "cpu", "dtype": "float32", "batch": 1, "threads": 2, "width": 1.0, "masks": "set", "kept": 0.3}
    times = {"dense_eager_ms": 3.0, "dense_best_ms": 2.0, "masked_ms": 4.0, "gated_ms": 0.8}
    return {**row, **times, "speedup": 2.5, "efficiency": 0.75, **values}


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"gatedkernels {gk.__version__}\n"


def test_train_writes_a_run(trained: Path):
    config = TrainConfig.from_json((trained / "config.json").read_text())
    assert (config.width, config.epochs, config.data) == (0.0625, 2, "synthetic")
    assert len(read_metrics(trained / "metrics.csv")) == 4


def test_resume_needs_no_options(trained: Path, monkeypatch: pytest.MonkeyPatch):
    assert run("train", "vicreg-dual", "--run-dir", trained, "--resume", monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(1)], ids=["before Lightning", "through Lightning"])
def test_a_stopped_run_says_how_to_go_on(
    stop: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr("gatedkernels.training.run.train_run", stopped)
    assert run("train", "vicreg-dual", "--run-dir", "runs/x", monkeypatch=monkeypatch) == 130
    assert "gatedkernels train vicreg-dual --run-dir runs/x --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "dino", "--run-dir", "runs/x"], "recipe must be one of vicreg-dual, vicreg-dual-digits, us3l"),
        (["train", "vicreg-dual", "--run-dir", "runs/x", "--budgett", "0.3"], "--budgett is none of the options"),
        (["train", "vicreg-dual", "--run-dir", "runs/x", "--budget", "3"], "budget must be above 0 and at most 1"),
        (["train", "vicreg-dual", "--run-dir", "runs/x", "--epochs", "many"], "--epochs"),
        (["train", "vicreg-dual", "--run-dir", "runs/x", "--precision", "8"], "bf16-mixed"),
        (["train", "vicreg-dual"], "--run-dir"),
        (["train", "vicreg-dual", "--run-dir", "runs/x", "--warmup-epochs", "500"], "below --epochs=500, got 500"),
        (
            ["train", "us3l", "--run-dir", "runs/x", "--gate-group", "3"],
            "--gate-group is no option of us3l, whose",
        ),
        (["report", "runs/x", "--batch-size", "1", "two"], "batch sizes must be positive whole numbers, got"),
    ],
    ids=["recipe", "option", "range", "number", "choice", "missing", "two options", "other recipe", "batch"],
)
def test_wrong_words(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    assert run(*words, monkeypatch=monkeypatch) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "vicreg-dual", "--run-dir", "RUN", *SMALL], "--run-dir must be new"),
        (
            ["train", "vicreg-dual", "--run-dir", "RUN", "--resume", "--epochs", "9"],
            "--epochs must be 2 as the run",
        ),
        (["train", "vicreg-dual", "--run-dir", "NEW", "--data", "imagefolder"], "--data-dir must name the folder"),
        (["train", "vicreg-dual", "--run-dir", "NEW", "--resume"], "config.json is missing"),
        (["evaluate", "NEW"], "config.json is missing"),
        (["masks", "NEW", "--out", "NEW/masks.json"], "config.json is missing"),
    ],
    ids=["exists", "changed", "data", "nothing to resume", "nothing to evaluate", "no masks"],
)
def test_what_a_user_can_mend_is_said_in_one_line(
    words: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    places = {"RUN": str(trained), "NEW": str(tmp_path / "new"), "NEW/masks.json": str(tmp_path / "masks.json")}
    assert run(*(places.get(word, word) for word in words), monkeypatch=monkeypatch) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "gatedkernels.training.loop", raising=False)
    monkeypatch.delitem(sys.modules, "gatedkernels.training.run", raising=False)
    assert run("train", "vicreg-dual", "--run-dir", tmp_path / "run", *SMALL, monkeypatch=monkeypatch) == 1
    assert "pip install 'gatedkernels[train]'" in capsys.readouterr().err


def test_every_field_is_an_option_with_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("train", "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    for item in OPTIONS:
        assert f"--{item.replace('_', '-')}" in shown


@pytest.mark.parametrize("command", ["", "train", "evaluate", "masks", "demo", "report", "calibrate", "tune", "doctor"])
def test_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*command.split(), "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.replace("[ARGS]...", "")  # nothing is cut


def test_help_says_defaults_by_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("train", "--help", monkeypatch=monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Base learning rate. Default: 0.3 (vicreg- dual), 0.5 (us3l, us-net)." in shown
    assert "Side of the views. Default: 32." in shown
    assert "us-moco-v3-vit, us-net Arguments:" in shown


def test_tables_fit_a_terminal():
    row = latency_row(width=0.125, masks="trained", batch=16, dense_eager_ms=123.4, dense_best_ms=123.4, gated_ms=100.5)
    accuracy = {name: dict.fromkeys(MEASURES, 0.5) for name in ("pixels", "random_init", "dense", "gated")}
    tables = (
        demo.latency_table([row]),
        demo.accuracy_table({"accuracy": accuracy, "data": {"name": "digits"}}),
    )
    for table in tables:
        assert Console(width=200).measure(table).maximum <= 80


def test_evaluate(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("evaluate", trained, monkeypatch=monkeypatch) == 0
    results = json.loads((trained / "evaluation.json").read_text())
    assert results["data"] == {"name": "synthetic", "train": 64, "test": 64}
    assert results["accuracy"].keys() == {"pixels", "random_init", "dense", "gated"}
    for scores in results["accuracy"].values():
        assert tuple(scores) == MEASURES
        assert all(0 <= value <= 1 for value in scores.values())
    flops = results["flops"]
    assert flops["executed"] == pytest.approx(flops["kept"] * flops["dense"], abs=1)
    assert "FLOPs" in capsys.readouterr().out


def test_evaluate_only_what_is_asked_for(trained: Path, monkeypatch: pytest.MonkeyPatch):
    assert run("evaluate", trained, "--knn", monkeypatch=monkeypatch) == 0
    results = json.loads((trained / "evaluation.json").read_text())
    assert set(results["accuracy"]["gated"]) == {"knn1", "knn1_folds"}


def test_evaluate_on_new_crops(trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gatedkernels.training.evaluation.linear.EPOCHS", 3)
    assert run("evaluate", trained, "--augmented", monkeypatch=monkeypatch) == 0
    accuracy = json.loads((trained / "evaluation.json").read_text())["accuracy"]
    assert set(accuracy["gated"]) == set(accuracy["dense"]) == {"linear_augmented"}


def test_masks(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "masks" / "synthetic.json"
    assert run("masks", trained, "--out", out, "--limit", 32, monkeypatch=monkeypatch) == 0
    report = json.loads(out.read_text())
    assert report["samples"] == 32
    assert report["run"]["steps"] == 4
    assert {name: mask.shape for name, mask in stored_masks(report).items()}["layer1.0"] == (32, 4)


def test_report_takes_batch_sizes_in_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from gatedkernels.reporting import command

    calls: list[Any] = []
    monkeypatch.setattr(command, "report", lambda *args, **options: calls.append((args, options)))
    assert run("report", tmp_path, "--batch-size", 1, 16, 256, monkeypatch=monkeypatch) == 0
    assert run("report", tmp_path, monkeypatch=monkeypatch) == 0
    assert calls[0] == ((tmp_path,), {"device": "cpu", "batch_sizes": (1, 16, 256)})
    assert calls[1][1]["batch_sizes"] == (1, 16)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The whole of it, on less data, a smaller network and invented latencies."""
    small = {"limit": 64, "width": 0.0625, "embedding": 8, "epochs": 3, "gate_warmup_epochs": 0}
    monkeypatch.setattr(demo, "make_config", lambda recipe, seed: make_config(recipe, seed=seed, **small))
    monkeypatch.setattr(demo, "measure_latency", lambda *args: [latency_row(), latency_row(batch=16)])
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--seed", 1, monkeypatch=monkeypatch) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["name"] == "digits"
    assert (report["method"], report["width"], report["epochs"]) == ("vicreg-dual-digits", 0.0625, 3)
    assert report.keys() >= {"budget", "seconds", "accuracy", "flops", "latency"}
    assert report["accuracy"].keys() == {"pixels", "random_init", "dense", "gated"}
    assert report["flops"].keys() == {"dense", "executed", "kept"}
    assert (out / "speedup.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "2.50 times as fast" in text
    assert "random init" in text
    assert "2.50 times as fast" in " ".join(capsys.readouterr().out.split())

    assert run("demo", "--out", out, "--seed", 1, monkeypatch=monkeypatch) == 0
    assert json.loads((out / "report.json").read_text()) == report
