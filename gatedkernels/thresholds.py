"""Measured thresholds: a table on disk, by machine or GPU, threads and shape class, from density to who serves.

``gatedkernels.calibration`` measures and writes it; ``gatedkernels.policy`` reads it once, when it first chooses.
"""

import math
import platform
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedkernels import _extension
from gatedkernels.store import FOLDER_VARIABLE as FOLDER_VARIABLE
from gatedkernels.store import Store, version

FORMAT = 1

# Thresholds by kind of call ("conv_out 3x3 float32 channels-last"), and then by class of channels and of pixels.
Table = dict[str, dict[int, dict[int, float]]]


def path() -> Path:
    """The file: in the folder that GATEDKERNELS_CACHE names, else in the user's cache (XDG_CACHE_HOME)."""
    return _STORE.path()


def machine() -> str:
    """What a measurement holds for, threads aside: processor, instruction set, and whose kernels were compared."""
    return f"{cpu_name()}, {_extension.instruction_set()}, torch {torch.__version__}, gatedkernels {version()}"


GPU_THREADS = 0  # what measurements on a GPU are kept under


@lru_cache
def gpu(device: torch.device) -> str:
    """The same for a GPU."""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    versions = f"cuDNN {torch.backends.cudnn.version()}, triton {version('triton')}, torch {torch.__version__}"
    return f"{name}, sm_{major}{minor}, {versions}, gatedkernels {version()}"


def gpu_kind(kernel: str, weight: Tensor, rounded: bool, image: int) -> str:
    """What is looked up first on a GPU: what is computed, and from how many output pixels of a sample.

    Args:
        kernel: Whose threshold.
        weight: Of its filters.
        rounded: Whether float32 numbers may be rounded to tf32.
        image: Output pixels of one sample: they say how often a fetched weight is used.
    """
    side, dtype = weight.shape[-1], str(weight.dtype).removeprefix("torch.")
    dtype = "tf32" if rounded and weight.dtype == torch.float32 else dtype
    return f"{kernel} {side}x{side} {dtype}, images of {pixel_class(image)} pixels"


def kind(kernel: str, weight: Tensor, channels_last: bool) -> str:
    """What is looked up first: what is computed, and how the images lie; tokens lie in one way."""
    side, dtype = weight.shape[-1], str(weight.dtype).removeprefix("torch.")
    if weight.ndim == 2:
        return f"{kernel} {dtype}"
    return f"{kernel} {side}x{side} {dtype} {'channels-last' if channels_last else 'converted'}"


def channel_class(weight: Tensor) -> int:
    """Geometric mean of input and output channels, to the next power of two."""
    return 1 << round(math.log2(max(weight.shape[0] * weight.shape[1], 1)) / 2)


def pixel_class(pixels: int) -> int:
    """Output pixels of the whole batch, to the next power of four."""
    return 1 << 2 * round(math.log2(max(pixels, 1)) / 2)


def find(table: Table, kind_: str, channels: int, pixels: int) -> float | None:
    """The threshold of a class, or of the next smaller measured one of its channels: more pixels pay more."""
    measured = table.get(kind_, {}).get(channels, {})
    below = [most for most in measured if most <= pixels]
    return measured[max(below)] if below else None


def load(threads: int, where: str | None = None) -> Table:
    """The thresholds measured here with so many threads; of a damaged file none, with a warning.

    Args:
        threads: Of the CPU; ``GPU_THREADS`` for a GPU.
        where: What they hold for; None: this machine.
    """
    return _parse(_STORE.load().get(where or machine(), {}).get(str(threads), {}).get("thresholds", {}))


def check_writable() -> Path:
    """The file, in a folder that can be written.

    Raises:
        OSError: If it cannot; the message names the folder and the variable that chooses another one.
        ValueError: If a newer gatedkernels wrote the file.
    """
    return _STORE.check_writable()


def save(table: Table, threads: int, where: str | None = None) -> Path:
    """Merge thresholds into the file; others that are there stay, also those that another process writes meanwhile.

    A damaged file is kept under another name, with a warning. Arguments are those of `load`.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If a newer gatedkernels wrote the file.
    """

    def merge(machines: dict[str, Any]) -> None:
        entry = machines.setdefault(where or machine(), {}).setdefault(str(threads), {})
        thresholds = _parse(entry.get("thresholds", {}))
        for kind_, by_channels in table.items():
            for channels, by_pixels in by_channels.items():
                thresholds.setdefault(kind_, {}).setdefault(channels, {}).update(by_pixels)
        entry["measured"] = f"{datetime.now():%Y-%m-%dT%H:%M:%S}"
        entry["thresholds"] = thresholds

    return _STORE.update(merge)


def _check(machines: dict[str, Any]) -> None:
    for by_threads in machines.values():
        for entry in by_threads.values():
            _parse(entry["thresholds"])


def _parse(thresholds: Mapping[str, Any]) -> Table:
    table: Table = {}
    for kind_, by_channels in thresholds.items():
        for channels, by_pixels in by_channels.items():
            row = {int(pixels): float(density) for pixels, density in by_pixels.items()}
            if not all(0 <= density <= 1 for density in row.values()):
                raise ValueError(by_pixels)
            table.setdefault(kind_, {})[int(channels)] = row
    return table


_STORE = Store("thresholds", FORMAT, _check, "thresholds between 0 and 1")


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
