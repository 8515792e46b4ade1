"""Every recipe of slimmable networks trains on digits, stops and continues to the same bits, and is evaluated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from gatedkernels.nn import width
from gatedkernels.reporting.command import evaluate_widths
from gatedkernels.training import loop
from gatedkernels.training.augment import plain_view
from gatedkernels.training.config import SlimmableConfig, US3LConfig
from gatedkernels.training.errors import RunError, TrainingError
from gatedkernels.training.methods import US3L
from gatedkernels.training.metrics_log import read_metrics
from gatedkernels.training.recipes import RECIPES, build_method, make_config
from gatedkernels.training.run import (
    evaluate_slimmable_run,
    load_classifier,
    load_run,
    load_run_data,
    load_slimmable_run,
    train_run,
)
from gatedkernels.training.run_folder import RunFolder

SLOW = ("moco-v3-vit", "us-moco-v3-vit")
SLIMMABLE = [
    pytest.param(name, {}, marks=pytest.mark.slow if name in SLOW else ())
    for name, (kind, _) in RECIPES.items()
    if issubclass(kind, SlimmableConfig)
]


class Killed(BaseException):
    """Stands for whatever ends a process."""


def small(recipe: str, **options: Any) -> SlimmableConfig:
    chosen: dict[str, Any] = {"limit": 64, "image_size": 16, "lr": 0.05, "epochs": 2, "batch_size": 16}
    if issubclass(RECIPES[recipe][0], US3LConfig):
        chosen |= {"embedding": 16, "hidden": 16, "queue": 40}
    if recipe.endswith("vit"):
        chosen |= {"patch_size": 8, "lr": 1e-3, "warmup_epochs": 0}
    elif options.get("network", "resnet").startswith("resnet"):
        chosen["width"] = 0.125
    config = make_config(recipe, **{**chosen, **options})
    assert isinstance(config, SlimmableConfig)
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "teacher"
    train_run(small("byol", epochs=1), path, progress=False)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return read_metrics(path / "metrics.csv")


# Beside the networks that the recipes name.
OTHER_NETWORKS = [
    pytest.param(recipe, {"network": network}, marks=pytest.mark.slow)
    for recipe, network in (
        *(("us3l", name) for name in ("mobilenet_v2", "resnet34", "resnet50")),
        *((name, "mobilenet_v2") for name in ("byol", "us-simclr", "us-simsiam", "us-net")),
        ("us3l-vit", "vit_small"),
    )
]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [*SLIMMABLE, *OTHER_NETWORKS],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_a_stopped_run_on_digits_continues_to_the_same_losses(
    recipe: str, options: dict[str, Any], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small(recipe, **options)
    if recipe.startswith("us3l"):
        config = replace(config, dynamic_sampling=False)
    if recipe.startswith("seed"):
        config = replace(config, teacher_run=teacher)
    train_run(config, tmp_path / "whole", progress=False)
    whole = rows(tmp_path / "whole")
    assert len(whole) == 8
    watched = ("loss", "accuracy" if recipe == "us-net" else "deviation")
    assert all(torch.isfinite(torch.tensor([float(row[name]) for name in watched])).all() for row in whole)

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


def test_evaluation_at_every_width(tmp_path: Path):
    path = tmp_path / "run"
    train_run(small("us3l", epochs=4), path, progress=False)
    evaluate_widths(path, measures=["knn1", "linear"], widths=[0.5, 1.0])
    results = json.loads((path / "evaluation.json").read_text())
    assert [row["width"] for row in results["widths"]] == [0.5, 1.0]
    narrow, full = results["widths"]
    assert narrow["macs"] < full["macs"] and narrow["params"] < full["params"]
    for row in results["widths"]:
        assert row["ms"].keys() == {"1", "16"}
        assert row["accuracy"].keys() == row["random_init"].keys() == {"knn1", "linear"}
    assert (path / "widths.png").stat().st_size > 1000

    config, backbone = load_slimmable_run(path)
    trained, data = RunFolder(path).read_weights(), load_run_data(config)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in trained.items())
    again, calibrated = evaluate_slimmable_run(path, measures=["knn1"], widths=[0.5])
    assert again["widths"][0]["accuracy"]["knn1"] == narrow["accuracy"]["knn1"]
    view = plain_view(16, data.mean, data.std)
    images = torch.stack([view(data.train[index]) for index in range(64)])
    with torch.no_grad(), width(calibrated, 0.5):
        first = calibrated.conv1(images)
        torch.testing.assert_close(calibrated.bn1.statistics()[0], first.mean((0, 2, 3)))


def test_a_run_of_one_width_is_evaluated_there(tmp_path: Path):
    train_run(small("simclr", fixed_width=0.5, epochs=1), tmp_path / "run", progress=False)
    results, _ = evaluate_slimmable_run(tmp_path / "run", measures=["knn1"])
    assert [row["width"] for row in results["widths"]] == [0.5]


def test_each_kind_of_run_has_its_evaluation(tmp_path: Path):
    train_run(small("simclr", epochs=1), tmp_path / "run", progress=False)
    with pytest.raises(RunError, match=r"run must be one of a gated network, .* holds one of simclr"):
        load_run(tmp_path / "run")
    RunFolder(tmp_path / "run").write_config(make_config("vicreg-dual"))
    with pytest.raises(RunError, match=r"run must be one of a slimmable network, .* holds one of vicreg-dual"):
        load_slimmable_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"base": "mse"},
            "base must be 'relative' or 'absolute' or 'keys' or 'queue' or",
        ),
        ({"passes": 1}, "passes must be at least 2, got 1"),
        ({"least": 0.0}, "least must be above 0 and at most 1, got 0.0"),
        ({"fixed_width": 1.5}, "fixed_width must be above 0 and at most 1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1, got 1.0"),
        ({"group_strength": 0.5}, r"group_strength must be in \[0, 1/7\), got 0.5"),
        ({"optimizer": "adamw"}, "group_strength must be 0 with adamw, got 0.05"),
        ({"ema_end": 1.5}, "ema_end must be at least 0 and at most 1, got 1.5"),
        ({"network": "mobilenet_v2", "width": 0.5}, "width must be 1 for mobilenet_v2, got 0.5"),
        ({"network": "vit_tiny", "patch_size": 5}, "patch_size must divide image_size=32, got 5"),
        ({"budget": 0.3}, "option must be one of recipe, data, .*, got 'budget'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_config("us3l", **options)


def test_a_frozen_teacher_stays(teacher: Path):
    method = build_method(small("seed-mse", teacher_run=teacher))
    assert isinstance(method, US3L) and method.teacher is not None
    stored = RunFolder(teacher).check_checkpoint()["state_dict"]
    method._follow(0)
    for name, value in method.teacher[0].state_dict().items():
        assert torch.equal(value, stored[f"backbone.{name}"])
    for name, value in method.teacher[1].state_dict().items():
        assert torch.equal(value, stored[f"head.{name}"])
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_what_cannot_teach_is_refused(teacher: Path, tmp_path: Path):
    with pytest.raises(TrainingError, match="teacher_run must be the folder of a run, whose network seed learns from"):
        train_run(small("seed"), tmp_path / "run", progress=False)
    with pytest.raises(TrainingError, match="embedding must be 16 as the teacher's, got 8"):
        train_run(small("seed", teacher_run=teacher, embedding=8), tmp_path / "run", progress=False)
    with pytest.raises(RunError, match=r"config\.json is missing"):
        train_run(small("seed", teacher_run=tmp_path), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of photographs: bright above, and bright below."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 24), ("test", 8)):
        for label in range(2):
            path = tmp_path / "images" / part / f"class {label}"
            path.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 100, (20, 20, 3), generator=generator, dtype=torch.uint8)
                pixels[10 * label : 10 * label + 10] += 120
                Image.fromarray(pixels.numpy()).save(path / f"{index}.png")
    return tmp_path / "images"


def test_labels_teach_a_folder_of_images_at_every_width(folder: Path, tmp_path: Path):
    path = tmp_path / "run"
    options = {"data": "imagefolder", "data_dir": folder, "limit": None, "epochs": 6, "passes": 2}
    train_run(small("us-net", **options), path, progress=False)
    logged = rows(path)
    assert [float(row["lr"]) for row in logged[::3]] == pytest.approx([0.05 * (6 - epoch) / 6 for epoch in range(6)])
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    evaluate_widths(path, measures=["knn1"], widths=[0.25, 1.0])
    results = json.loads((path / "evaluation.json").read_text())
    for row in results["widths"]:
        assert row["accuracy"]["classifier"] > 0.8
        assert row["random_init"].keys() == {"knn1"}


def test_a_vision_transformer_needs_no_statistics(tmp_path: Path):
    train_run(small("us-moco-v3-vit", epochs=1, limit=32), tmp_path / "run", progress=False)
    results, _ = evaluate_slimmable_run(tmp_path / "run", measures=["knn1"], widths=[0.25, 1.0])
    assert [row["width"] for row in results["widths"]] == [0.25, 1.0]


def test_a_classifier_is_looked_for_where_labels_taught(teacher: Path):
    _, backbone = load_slimmable_run(teacher)
    with pytest.raises(RunError, match=r"last\.ckpt must hold the classifier of a run with labels, got none that fits"):
        load_classifier(teacher, backbone)


def test_labels_need_classes():
    with pytest.raises(ValueError, match="num_classes must be the number of classes for us-net, got None"):
        build_method(small("us-net"))
