"""The configurations that ``gatedkernels.tune`` measured, on disk by device; the shipped ones where there is none."""

from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from gatedkernels.ops.ragged.configurations import Configuration, Shape, Tile, configure
from gatedkernels.store import Store, version

FORMAT = 1
# What the interpreter, and whoever asks without a GPU, is told.
NO_CAPABILITY = (0, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else NO_CAPABILITY


@lru_cache
def machine(device: torch.device) -> str:
    """What a measurement holds for: the device, and whose code was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return f"{name}, triton {triton.__version__}, torch {torch.__version__}, gatedkernels {version()}"


def find(shape: Shape, device: torch.device, tiles_free: bool = False) -> Configuration:
    """The measured configuration of a shape on a device, else the shipped one."""
    found = measured(machine(device)).get(shape.key())
    return configure(shape, capability(device), tiles_free) if found is None else found


@lru_cache
def measured(name: str) -> dict[str, Configuration]:
    """What was measured on a machine, by ``Shape.key``; read once, at the first launch."""
    entry = TILES.load().get(name, {}).get("tiles", {})
    return {key: _parse(numbers) for key, numbers in entry.items()}


def in_effect(device: torch.device) -> dict[str, dict[str, int]]:
    """What was measured on a device and serves there, by ``Shape.key``, JSON-able: another tile has other last bits."""
    return {key: _numbers(chosen) for key, chosen in measured(machine(device)).items()}


def save(device: torch.device, found: dict[str, Configuration]) -> Path:
    """Merge configurations into the file.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If a newer gatedkernels wrote the file.
    """

    def merge(machines: dict[str, Any]) -> None:
        entry = machines.setdefault(machine(device), {})
        entry.setdefault("tiles", {}).update({key: _numbers(each) for key, each in found.items()})
        entry["measured"] = f"{datetime.now():%Y-%m-%dT%H:%M:%S}"

    return TILES.update(merge)


def _numbers(configuration: Configuration) -> dict[str, int]:
    return {**configuration.tile._asdict(), "splits": configuration.splits, "programs": configuration.programs}


def _parse(numbers: dict[str, Any]) -> Configuration:
    values = {name: int(number) for name, number in numbers.items()}
    chosen = Configuration(
        Tile(*(values.pop(name) for name in Tile._fields)), values.pop("splits"), values.pop("programs")
    )
    sizes = (*chosen.tile[:4], chosen.splits)  # what the compiler takes powers of two for
    if values or min(chosen.tile[:3]) < 16 or any(size & (size - 1) or not 0 < size <= 1024 for size in sizes):
        raise ValueError(numbers)
    both = chosen.splits > 1 and chosen.programs
    if not 1 <= chosen.tile.stages <= 16 or not 0 <= chosen.programs <= 32 or both:
        raise ValueError(numbers)
    return chosen


def _check(machines: dict[str, Any]) -> None:
    for entry in machines.values():
        for numbers in entry["tiles"].values():
            _parse(numbers)


TILES = Store("tiles", FORMAT, _check, "tiles, splits and programs in whole numbers that kernels can have")
