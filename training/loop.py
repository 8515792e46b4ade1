"""Run a method: data, progress bar, log, checkpoints, and going on after a stop."""

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader

from gatedkernels import policy
from gatedkernels.training.augment import VIEWS, EpochSampler, LabelledViews, Views
from gatedkernels.training.config import Device, RunConfig, USNetConfig
from gatedkernels.training.data import Data
from gatedkernels.training.errors import DataError, RunError, TrainingError
from gatedkernels.training.metrics_log import MetricsLog
from gatedkernels.training.run_folder import RunFolder, write_atomically

# What a resumed run may do differently: nothing here changes what is computed, apart from rounding.
_CHANGEABLE = {"device", "workers", "data_dir"}


class _SaveEveryEpoch(Callback):
    """Write weights and checkpoint after every epoch, each whole or not at all."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.start = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of training so far, those before earlier stops included."""
        return {"seconds": round(time.monotonic() - self.start, 1)}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Count on from the checkpoint's seconds."""
        self.start = time.monotonic() - state_dict["seconds"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record which densities decide between kernels: with others a run goes on to other roundings."""
        checkpoint["thresholds"] = policy.in_effect()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so if they are others now."""
        if checkpoint.get("thresholds", policy.in_effect()) != policy.in_effect():
            warnings.warn("thresholds or threads differ from the checkpoint's: losses may, by rounding", stacklevel=2)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the epoch learned."""
        progress = {"epochs": trainer.current_epoch + 1, "steps": trainer.global_step, **self.state_dict()}
        self.folder.write_weights(pl_module.backbone.state_dict(), **progress)
        write_atomically(self.folder.checkpoint_file, partial(trainer.save_checkpoint))


class _StopOnNonFinite(Callback):
    """Stop a run whose loss is no number, before it is saved."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of the step."""
        loss = float(outputs["loss"].detach() if isinstance(outputs, Mapping) else outputs)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss must stay finite, got {loss} at step {trainer.global_step}; a smaller lr or another precision "
                "may help"
            )


def check_device(config: RunConfig) -> None:
    """Refuse a device or a precision that would silently become another.

    Raises:
        TrainingError: If the device is missing or lacks the precision.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise TrainingError("device must be available, got cuda where torch finds no GPU")
    if config.precision == "16-mixed" and (config.device == "cpu" or not has_cuda):
        raise TrainingError("precision must be 32 or bf16-mixed on a CPU, got 16-mixed")


def place_of(device: Device) -> torch.device:
    """Say where a device is: "auto" is a GPU if there is one."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def start_run(folder: RunFolder, config: RunConfig, *, resume: bool) -> RunConfig:
    """Prepare a folder that this process has locked.

    Args:
        folder: Where to train.
        config: The run; with ``resume`` it must be the one that the folder holds, but for where it runs.
        resume: Whether to continue.

    Returns:
        The configuration to train with.

    Raises:
        RunError: If there is a run already and ``resume`` is False, none and it is True, or a different one.
    """
    if not resume:
        for file in (folder.config_file, folder.checkpoint_file, folder.weights_file, folder.log_file):
            if file.exists():
                raise RunError(f"run_dir must be new, {folder.path} holds {file.name} of a run; continue with --resume")
        folder.write_config(config)
        return config
    stored = folder.read_config()
    names = [name for name in vars(config) if name not in _CHANGEABLE]
    if changed := [name for name in names if getattr(config, name) != getattr(stored, name)]:
        name = changed[0]
        raise RunError(f"{name} must be {getattr(stored, name)!r} as the run has it, got {getattr(config, name)!r}")
    return config


def view_loader(data: Data, config: RunConfig) -> Iterable[tuple[Tensor, ...]]:
    """Load pairs of views, or views and labels, in an order and with augmentations that depend on the seed alone.

    Raises:
        DataError: If there are fewer images than a batch holds; if whole batches are to be augmented, of images that
            are large, of several sizes, or too many for the device.
    """
    if len(data.train) < config.batch_size:
        raise DataError(f"batch_size must be at most the {len(data.train)} training images, got {config.batch_size}")
    options = {"blur": config.blur} if config.views == "photos" else {}
    labelled = isinstance(config, USNetConfig)
    if config.augment_on == "device":
        return _batch_views(data, config, labelled, options)
    view = VIEWS[config.views](config.image_size, data.mean, data.std, **options)
    views = LabelledViews(data.train, (view,), config.seed) if labelled else Views(data.train, (view,) * 2, config.seed)
    return DataLoader(
        views,
        batch_size=config.batch_size,
        sampler=EpochSampler(len(views), config.seed),
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _batch_views(
    data: Data, config: RunConfig, labelled: bool, options: Mapping[str, float]
) -> Iterable[tuple[Tensor, ...]]:
    from gatedkernels.training.batch_views import BATCH_VIEWS, LARGEST_IMAGE, BatchViews  # and kornia, for this alone

    side, most = max(data.train[0].shape[1:]), LARGEST_IMAGE * config.image_size
    if side > most:
        raise DataError(f"augment_on must be workers for images of more than {most} pixels a side, got {side}")
    if config.workers:
        warnings.warn(f"workers={config.workers} do nothing where augment_on is device", stacklevel=2)
    return BatchViews(
        data.train,
        BATCH_VIEWS[config.views](config.image_size, data.mean, data.std, **options),
        1 if labelled else 2,
        batch_size=config.batch_size,
        seed=config.seed,
        device=place_of(config.device),
        labelled=labelled,
    )


def train(
    module: pl.LightningModule,
    loader: Iterable[tuple[Tensor, ...]],
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train a method in a folder that was prepared by :func:`start_run`.

    After every epoch the folder holds a checkpoint; a killed run continues from there to the same losses.

    Args:
        module: The method; its ``backbone`` is what evaluation will look at.
        loader: What the method learns from, from :func:`view_loader`.
        config: The run, whose device :func:`check_device` has accepted.
        folder: Where log, weights and checkpoints go.
        resume: Whether to continue after the last checkpoint; a run killed before its first one starts over.
        progress: Whether to draw a progress bar.

    Raises:
        RunError: If the checkpoint is damaged.
        TrainingError: If the loss is no number any more.
    """
    checkpoint: Path | None = None
    steps = 0
    if resume and folder.checkpoint_file.exists():
        steps = int(folder.check_checkpoint()["global_step"])
        checkpoint = folder.checkpoint_file
    module.backbone.to(memory_format=torch.channels_last)
    with _quiet():
        _trainer(config, folder, steps, progress).fit(module, loader, ckpt_path=checkpoint, weights_only=True)


class _Progress(RichProgressBar):
    """Counts epochs from one, as people do; the log counts them from zero, as Lightning does."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


def _trainer(config: RunConfig, folder: RunFolder, steps: int, progress: bool) -> pl.Trainer:
    """Build the Lightning trainer of a run that has taken ``steps`` steps."""
    return pl.Trainer(
        accelerator="gpu" if place_of(config.device).type == "cuda" else "cpu",
        devices=1,
        precision=config.precision,
        max_epochs=config.epochs,
        logger=MetricsLog(folder.log_file, keep_steps=steps),
        log_every_n_steps=1,
        callbacks=[_StopOnNonFinite(), _SaveEveryEpoch(folder), *([_Progress()] if progress else [])],
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The loader is as parallel as the user asked it to be.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning 2.6 builds torch's LeafSpec by its old name.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            # A GPU that the user declined.
            warnings.filterwarnings("ignore", message="GPU available but not used.*")
            yield
    finally:
        logger.setLevel(level)
