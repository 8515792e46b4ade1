"""A run from its configuration to its results: train it, load it, evaluate it, describe its masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedkernels.nn import SlimmableLinear
from gatedkernels.training.augment import plain_view
from gatedkernels.training.config import Device, Measure, RunConfig, SlimmableConfig, TrainConfig, USNetConfig
from gatedkernels.training.data import Data, load_data
from gatedkernels.training.errors import RunError, TrainingError
from gatedkernels.training.evaluation import (
    augmented_linear_accuracy,
    collect_masks,
    evaluate,
    evaluate_widths,
    mask_report,
)
from gatedkernels.training.loop import check_device, place_of, start_run, train, view_loader
from gatedkernels.training.recipes import (
    Backbone,
    SlimmableBackbone,
    backbone_costs,
    build_backbone,
    build_method,
    build_slimmable,
)
from gatedkernels.training.run_folder import RunFolder, write_json


def train_run(config: RunConfig, path: Path, *, resume: bool = False, progress: bool = True) -> None:
    """Train in a folder, which is locked meanwhile.

    What is wrong with the images, the network or the device shows before the folder is made.

    Args:
        config: The run.
        path: The folder: new, or with ``resume`` one that holds this run, finished or not.
        resume: Whether to continue after the last finished epoch.
        progress: Whether to draw a progress bar.

    Raises:
        RunError: If the folder is in use, cannot be written, or does not hold what it should.
        DataError: If the images cannot be read, or are fewer than a batch.
        TrainingError: If the device is missing or lacks the precision, no network has the widths that are asked for, or
            the loss is no number any more.
    """
    check_device(config)
    data = load_run_data(config)
    loader = view_loader(data, config)
    try:
        method = build_method(config, len(data.classes))
    except ValueError as error:
        names = "width and gate_group" if isinstance(config, TrainConfig) else "network, width and stem_padding"
        raise TrainingError(f"{names} must describe a network: {error}") from error
    folder = RunFolder(path)
    with folder.locked():
        start_run(folder, config, resume=resume)
        train(method, loader, config, folder, resume=resume, progress=progress)


def load_run(path: Path) -> tuple[TrainConfig, Backbone]:
    """Load a trained gated backbone.

    Args:
        path: Folder of the run.

    Returns:
        Its configuration, and the backbone in evaluation mode.

    Raises:
        RunError: If the folder holds no run of a gated network, or its files are damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    if not isinstance(config, TrainConfig):
        raise RunError(f"run must be one of a gated network, {path} holds one of {config.recipe}")
    backbone = build_backbone(config)
    try:
        backbone.load_state_dict(folder.read_weights())
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file} must fit {folder.config_file}: {error}") from error
    return config, backbone.eval()


def is_slimmable_run(path: Path) -> bool:
    """Whether a folder holds a run of a slimmable network.

    Raises:
        RunError: If it holds no run, or its configuration is damaged.
    """
    return isinstance(RunFolder(path).read_config(), SlimmableConfig)


def load_slimmable_run(path: Path) -> tuple[SlimmableConfig, SlimmableBackbone]:
    """Load a trained slimmable backbone.

    Args:
        path: Folder of the run.

    Returns:
        Its configuration, and the backbone in evaluation mode; its normalisations still need `calibrate_norms`.

    Raises:
        RunError: If the folder holds no run of a slimmable network, or its files are damaged.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    if not isinstance(config, SlimmableConfig):
        raise RunError(f"run must be one of a slimmable network, {path} holds one of {config.recipe}")
    backbone = build_slimmable(config)
    try:
        backbone.load_state_dict(folder.read_weights())
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file} must fit {folder.config_file}: {error}") from error
    tracking = build_slimmable(config, track_running_stats=True)
    tracking.load_state_dict(backbone.state_dict(), strict=False)  # training kept no statistics
    return config, tracking.eval()


def load_classifier(path: Path, backbone: SlimmableBackbone) -> SlimmableLinear:
    """Load the classifier that a run with labels trained.

    Args:
        path: Folder of the run.
        backbone: Its backbone.

    Raises:
        RunError: If the folder holds no finished epoch, its files are damaged, or no classifier is among them.
    """
    from gatedkernels.training.methods.us_net import make_classifier

    folder = RunFolder(path)
    state = folder.check_checkpoint()["state_dict"]
    own = {name: state.get(f"classifier.{name}") for name in ("weight", "bias")}
    if None in own.values() or own["weight"].ndim != 2 or own["weight"].shape[1] != backbone.num_features:
        raise RunError(f"{folder.checkpoint_file} must hold the classifier of a run with labels, got none that fits")
    classifier = make_classifier(backbone, len(own["weight"]))
    classifier.load_state_dict(own)
    return classifier


def load_run_data(config: RunConfig, data_dir: Path | None = None, limit: int | None = None) -> Data:
    """Load the images of a run, from another folder or fewer of them if asked."""
    return load_data(
        config.data,
        data_dir or config.data_dir,
        image_size=config.image_size,
        limit=config.limit if limit is None else limit,
        seed=config.seed,
    )


def evaluate_run(
    path: Path,
    *,
    measures: Sequence[Measure],
    augmented: bool = False,
    data_dir: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
) -> dict[str, Any]:
    """Evaluate a run and write the results beside it.

    Args:
        path: Folder of the run.
        measures: Which accuracies.
        augmented: Whether to run the linear protocol with new crops in each epoch too, for both branches.
        data_dir: Where the images are, if they have moved.
        batch_size: Images at a time.
        device: Where to compute.

    Returns:
        What the report of the demonstration holds up to ``flops``; also in ``evaluation.json``.

    Raises:
        RunError: If the folder holds no finished epoch, or its files are damaged.
        DataError: If the images cannot be read.
    """
    config, backbone = load_run(path)
    data = load_run_data(config, data_dir)
    place = place_of(device)
    costs = backbone_costs(backbone, config)
    results = {
        **describe_run(path, config, data),
        **evaluate(
            backbone,
            build_backbone(config),
            costs,
            data,
            config,
            measures=measures,
            batch_size=batch_size,
            device=place,
        ),
    }
    if augmented:
        for branch in ("dense", "gated"):
            results["accuracy"][branch]["linear_augmented"] = augmented_linear_accuracy(
                backbone, branch, costs, data, config, batch_size=batch_size, device=place
            )
    write_json(path / "evaluation.json", results)
    return results


def evaluate_slimmable_run(
    path: Path,
    *,
    measures: Sequence[Measure],
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    data_dir: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
) -> tuple[dict[str, Any], SlimmableBackbone]:
    """Evaluate a run of a slimmable network at some widths.

    Args:
        path: Folder of the run.
        measures: Which accuracies.
        widths: The widths; a run of one fixed width is evaluated there alone.
        data_dir: Where the images are, if they have moved.
        batch_size: Images at a time, for the statistics of each width too.
        device: Where to compute.

    Returns:
        What was trained, under ``accuracy`` that of the pixels and under ``widths`` one row a width, see
        `gatedkernels.training.evaluation.evaluate_widths`; and the backbone, its normalisations calibrated.

    Raises:
        RunError: If the folder holds no finished epoch, or its files are damaged.
        DataError: If the images cannot be read.
        ValueError: If a width is out of range.
    """
    config, backbone = load_slimmable_run(path)
    data = load_run_data(config, data_dir)
    if config.fixed_width is not None:
        widths = (config.fixed_width,)
    results = evaluate_widths(
        backbone,
        build_slimmable(config, track_running_stats=True),
        data,
        config,
        widths,
        classifier=load_classifier(path, backbone) if isinstance(config, USNetConfig) else None,
        measures=measures,
        batch_size=batch_size,
        device=place_of(device),
    )
    return {**describe_run(path, config, data), **results}, backbone


def describe_run(path: Path, config: RunConfig, data: Data) -> dict[str, Any]:
    """Say what a run's weights were trained on, how, and for how long."""
    progress = RunFolder(path).read_progress()
    budget = {"budget": config.budget} if isinstance(config, TrainConfig) else {}
    return {
        "data": {"name": data.name, "train": len(data.train), "test": len(data.test)},
        "method": config.recipe,
        "width": config.width,
        **budget,
        "epochs": int(progress["epochs"]),
        "steps": int(progress["steps"]),
        "seconds": progress["seconds"],
        "seed": config.seed,
    }


def masks_of_run(path: Path, out: Path, *, limit: int | None = None, data_dir: Path | None = None) -> dict[str, Any]:
    """Describe the masks of a run on its test images in a JSON file.

    Args:
        path: Folder of the run.
        out: The file.
        limit: Test images to look at; None: all.
        data_dir: Where the images are, if they have moved.

    Returns:
        What was written; see `gatedkernels.training.evaluation.mask_report`.
    """
    config, backbone = load_run(path)
    everything = load_run_data(config, data_dir)
    data = everything if limit is None or limit >= len(everything.test) else load_run_data(config, data_dir, limit)
    view = plain_view(config.image_size, data.mean, data.std)
    masks = collect_masks(backbone, data.test, view)
    report = mask_report(masks, describe_run(path, config, everything), seed=config.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    return report
