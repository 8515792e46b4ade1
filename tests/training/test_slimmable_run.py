"""Every recipe of slimmable networks trains on digits, stops and continues to the same bits, and is evaluated."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from gatedkernels.training import loop
from gatedkernels.training.config import SlimmableConfig
from gatedkernels.training.metrics_log import read_metrics
from gatedkernels.training.recipes import RECIPES, make_config
from gatedkernels.training.run import train_run
from gatedkernels.training.run_folder import RunFolder

SLIMMABLE = [name for name, (kind, _) in RECIPES.items() if kind is SlimmableConfig]


class Killed(BaseException):
    """Stands for whatever ends a process."""


def small(recipe: str, **options: Any) -> SlimmableConfig:
    chosen = {"limit": 64, "image_size": 16, "width": 0.125, "embedding": 16, "hidden": 16, "queue": 40, "lr": 0.05}
    config = make_config(recipe, **{**chosen, "epochs": 2, "batch_size": 16, **options})
    assert isinstance(config, SlimmableConfig)
    return config


def rows(path: Path) -> list[dict[str, str]]:
    return read_metrics(path / "metrics.csv")


@pytest.mark.parametrize("recipe", SLIMMABLE)
def test_a_stopped_run_on_digits_continues_to_the_same_losses(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small(recipe) if recipe != "us3l" else small(recipe, dynamic_sampling=False)
    train_run(config, tmp_path / "whole", progress=False)
    whole = rows(tmp_path / "whole")
    assert len(whole) == 8
    assert all(
        torch.isfinite(torch.tensor([float(row[name]) for name in ("loss", "deviation")])).all() for row in whole
    )

    def kill(self: Any, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._StopOnNonFinite, "on_train_batch_end", kill)
        train_run(config, tmp_path / "killed", progress=False)
    train_run(config, tmp_path / "killed", resume=True, progress=False)
    assert rows(tmp_path / "killed") == whole
    weights = [RunFolder(tmp_path / name).read_weights() for name in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_dynamic_sampling_and_warmup_are_options(tmp_path: Path):
    train_run(small("us3l", epochs=4, warmup_epochs=1, limit=32), tmp_path / "run", progress=False)
    logged = rows(tmp_path / "run")
    assert [float(row["width"]) for row in logged[::2]] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [float(row["lr"]) for row in logged[::2]] == pytest.approx([0.0005, 0.05, 0.0375, 0.0125])


def test_one_width_alone(tmp_path: Path):
    train_run(small("byol", fixed_width=0.5), tmp_path / "run", progress=False)
    assert {row["width"] for row in rows(tmp_path / "run")} == {"0.5"}
