"""The folder of a run: locked while in use, written piece by piece, never half."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gatedkernels.training.config import RunConfig
from gatedkernels.training.errors import RunError
from gatedkernels.training.recipes import config_from_json

# What torch.load raises for files that are cut off, damaged, something else, or would execute code.
_UNREADABLE = (AttributeError, EOFError, KeyError, OSError, RuntimeError, UnpicklingError, ValueError)


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its configuration, log, checkpoint, weights and results."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The configuration, JSON."""
        return self.path / "config.json"

    @property
    def log_file(self) -> Path:
        """The losses of every step, CSV."""
        return self.path / "metrics.csv"

    @property
    def checkpoint_file(self) -> Path:
        """Everything needed to continue after the last finished epoch."""
        return self.path / "last.ckpt"

    @property
    def weights_file(self) -> Path:
        """The backbone's weights after the last finished epoch, safetensors."""
        return self.path / "backbone.safetensors"

    def read_config(self) -> RunConfig:
        """Read the configuration.

        Raises:
            RunError: If there is none, or it is damaged.
        """
        try:
            return config_from_json(self.config_file.read_text())
        except FileNotFoundError as error:
            raise RunError(f"run must be the folder of a training run, {self.config_file} is missing") from error
        except (OSError, TypeError, ValueError) as error:
            raise RunError(f"{self.config_file} must be a run's configuration: {error}") from error

    def read_weights(self) -> dict[str, Tensor]:
        """Read the backbone's weights.

        Raises:
            RunError: If there are none yet, or the file is damaged.
        """
        self._require(self.weights_file)
        try:
            with safe_open(self.weights_file, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.weights_file} must be a complete safetensors file: {error}") from error

    def read_progress(self) -> dict[str, float]:
        """Read for how many epochs, steps and seconds the weights were trained."""
        self._require(self.weights_file)
        try:
            with safe_open(self.weights_file, framework="pt") as file:
                return {name: float(value) for name, value in (file.metadata() or {}).items()}
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.weights_file} must be a complete safetensors file: {error}") from error

    def check_checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint without executing anything in it.

        Raises:
            RunError: If it is missing, cut off, or no checkpoint.
        """
        self._require(self.checkpoint_file)
        try:
            checkpoint = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"{self.checkpoint_file} must be a complete checkpoint: {reason}. Nothing was changed; "
                "to start over, choose another run folder."
            ) from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise RunError(f"{self.checkpoint_file} must be a checkpoint of a run, got {type(checkpoint).__name__}")
        return checkpoint

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration."""
        write_atomically(self.config_file, lambda path: path.write_text(config.to_json()))

    def write_weights(self, weights: dict[str, Tensor], **progress: float) -> None:
        """Write the backbone's weights and what they were trained for."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        metadata = {name: str(value) for name, value in progress.items()}
        write_atomically(self.weights_file, lambda path: save_file(tensors, path, metadata))

    def _require(self, file: Path) -> None:
        if not file.is_file():
            raise RunError(f"run must have finished an epoch, {file} is missing")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go when the process ends, however it ends.

        Raises:
            RunError: If the folder cannot be written, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunError(
                f"run_dir must be a folder that can be written, got {self.path}: {error.strerror}"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"run_dir must not be in use, another process is training in {self.path}") from error
            yield


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either the old one or the new one, whole, whenever the process or the machine stops.

    Args:
        target: The file.
        write: Writes the content to the path that it receives.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(target, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
