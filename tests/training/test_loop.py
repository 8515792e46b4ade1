"""A run is reproducible to the bit, and so is one that was stopped and continued."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from gatedkernels.training import loop
from gatedkernels.training.config import TrainConfig
from gatedkernels.training.errors import DataError, RunError, TrainingError
from gatedkernels.training.metrics_log import MetricsLog, read_metrics
from gatedkernels.training.recipes import make_config
from gatedkernels.training.run import train_run
from gatedkernels.training.run_folder import RunFolder


class Killed(BaseException):
    """Stands for whatever ends a process."""


def small(**options: Any) -> TrainConfig:
    chosen = {"data": "synthetic", "limit": 32, "image_size": 16, "width": 0.0625, "embedding": 8, "epochs": 3}
    return make_config("vicreg-dual", **{**chosen, "batch_size": 16, "warmup_epochs": 1, "lr": 0.02, **options})


def losses(path: Path) -> list[tuple[str, str]]:
    return [(row["loss"], row["kept"]) for row in read_metrics(path / "metrics.csv")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return RunFolder(path).read_weights()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_run(small(), path, progress=False)
    return path


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end right after a step."""

    def hook(self: Any, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(loop._StopOnNonFinite, "on_train_batch_end", hook)


def test_people_read_epochs_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = []
    describe = loop._Progress._get_train_description
    monkeypatch.setattr(
        loop._Progress, "_get_train_description", lambda bar, epoch: said.append(describe(bar, epoch)) or said[-1]
    )
    train_run(small(epochs=2), tmp_path / "run")
    assert [*dict.fromkeys(said)] == ["epoch 1/2", "epoch 2/2"]
    assert [row["epoch"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == ["0", "0", "1", "1"]


def test_log_and_weights(finished: Path):
    rows = read_metrics(finished / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(str(step // 2), str(step)) for step in range(6)]
    assert RunFolder(finished).read_progress().keys() == {"epochs", "steps", "seconds"}
    assert RunFolder(finished).read_progress()["epochs"] == 3
    assert all(0 < float(row["kept"]) < 1.2 and float(row["loss"]) > 0 for row in rows)


def test_same_seed_same_bits(tmp_path: Path, finished: Path):
    train_run(small(), tmp_path / "again", progress=False)
    assert losses(tmp_path / "again") == losses(finished)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path / "again").items())


def test_another_seed_is_another_run(tmp_path: Path, finished: Path):
    train_run(small(seed=1), tmp_path / "other", progress=False)
    assert losses(tmp_path / "other") != losses(finished)


@pytest.mark.parametrize("step", [1, 2, 3, 5], ids=lambda step: f"step {step}")
def test_a_killed_run_continues_to_the_same_losses(
    step: int, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            train_run(small(), path, progress=False)
    train_run(small(), path, resume=True, progress=False)
    assert losses(path) == losses(finished)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(path).items())


def test_so_does_one_whose_batches_are_augmented_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small(augment_on="device")
    train_run(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            train_run(config, tmp_path / "killed", progress=False)
    train_run(config, tmp_path / "killed", resume=True, progress=False)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(finished: Path):
    before = losses(finished), weights(finished)
    train_run(small(), finished, resume=True, progress=False)
    assert losses(finished) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in weights(finished).items())


def test_workers_change_nothing(tmp_path: Path, finished: Path):
    train_run(small(workers=1), tmp_path / "run", progress=False)
    assert losses(tmp_path / "run") == losses(finished)


def test_a_run_is_not_overwritten(finished: Path):
    before = losses(finished)
    with pytest.raises(RunError, match=r"run_dir must be new, .* holds config\.json of a run; continue with --resume"):
        train_run(small(), finished, progress=False)
    assert losses(finished) == before


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(RunError, match="must be the folder of a training run"):
        train_run(small(), tmp_path, resume=True, progress=False)


def test_resume_refuses_another_run(finished: Path):
    with pytest.raises(RunError, match=r"lr must be 0\.02 as the run has it, got 0\.5"):
        train_run(small(lr=0.5), finished, resume=True, progress=False)


def test_truncated_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            train_run(small(), path, progress=False)
    checkpoint = path / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RunError, match=r"last\.ckpt must be a complete checkpoint: .* Nothing was changed"):
        train_run(small(), path, resume=True, progress=False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_diverging_run_stops_before_it_is_saved(tmp_path: Path):
    with pytest.raises(TrainingError, match="loss must stay finite, got"):
        train_run(small(lr=1e12, trust=1e12, epochs=10), tmp_path / "run", progress=False)
    assert not RunFolder(tmp_path / "run").checkpoint_file.exists()


def test_gate_warmup_trains_both_branches_dense(tmp_path: Path):
    train_run(small(gate_warmup_epochs=1), tmp_path / "run", progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["kept"] == "" for row in rows] == [True] * 2 + [False] * 4


def test_mixed_precision(tmp_path: Path, finished: Path):
    train_run(small(precision="bf16-mixed", epochs=2), tmp_path / "run", progress=False)
    mixed, full = losses(tmp_path / "run")[0], losses(finished)[0]
    assert mixed != full
    assert float(mixed[0]) == pytest.approx(float(full[0]), rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, TrainingError, "device must be available, got cuda where torch finds no GPU"),
        ({"precision": "16-mixed"}, TrainingError, "precision must be 32 or bf16-mixed on a CPU, got 16-mixed"),
        ({"data": "cifar10"}, DataError, "data_dir must name the folder of the cifar10 images, got None"),
        ({"batch_size": 64}, DataError, "batch_size must be at most the 32 training images, got 64"),
        (
            {"gate_group": 3},
            TrainingError,
            "width and gate_group must describe a network: .*group=3, got 4",
        ),
    ],
    ids=["device", "precision", "data", "too few images", "network"],
)
def test_what_cannot_start_leaves_no_folder(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        train_run(small(**options), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_learning_rate_is_logged(finished: Path):
    rates = [float(row["lr"]) for row in read_metrics(finished / "metrics.csv")][::2]
    assert rates == pytest.approx([0.0002, 0.02, 0.01], rel=1e-6)


def test_log_forgets_what_came_after_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path)
    for step in range(3):
        log.log_metrics({"epoch": 0, "loss": 1.5, "lr": 0.1, "unknown": 3.0}, step)
    with path.open("a") as file:
        file.write("1,3,1.")
    MetricsLog(path, keep_steps=2)
    assert [row["step"] for row in read_metrics(path)] == ["0", "1"]


def test_device_may_change_on_resume(tmp_path: Path, finished: Path):
    config = replace(small(), device="cpu")
    assert loop.start_run(RunFolder(finished), config, resume=True) == config
