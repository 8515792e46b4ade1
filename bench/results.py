"""Files of results: where, by what, and every cell."""

import json
import math
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.runner import Cell
from gatedkernels.reporting.machine import cpu_name, instruction_set, versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Results:
    """One run of the suite.

    Attributes:
        machine: Processor, threads, instruction set.
        versions: Versions of what decides the numbers.
        commit: What was measured; "+" behind it: with changes that were not committed.
        date: When, in local time.
        cells: What was measured.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    cells: list[Cell]

    @classmethod
    def here(cls, cells: Iterable[Cell]) -> "Results":
        """Results of this process."""
        machine = {
            "processor": cpu_name(),
            "threads": torch.get_num_threads(),
            "instruction_set": instruction_set() or "none",
        }
        return cls(
            machine,
            versions("onnxruntime", "openvino"),
            _commit(),
            datetime.now().isoformat(timespec="minutes"),
            list(cells),
        )

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file.

        Raises:
            ValueError: If it holds no results.
        """
        try:
            content = json.loads(path.read_text())
            cells = [Cell(**cell) for cell in content.pop("cells")]
            return cls(**content, cells=cells)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path must be a file of benchmark results, got {path}: {error}") from error

    def save(self, path: Path | None = None) -> Path:
        """Write a file, by default ``bench/results/<machine>-<date>.json``, and return where it lies."""
        if path is None:
            slug = re.sub(r"[^a-z0-9]+", "-", self.machine["processor"].lower()).strip("-")
            stamp = self.date.replace(":", "")
            path = RESULTS / f"{slug}-{self.machine['threads']}t-{stamp}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**vars(self), "cells": [cell._asdict() for cell in self.cells]}
        path.write_text(json.dumps(_rounded(content), indent=1) + "\n")
        return path

    def groups(self) -> dict[str, list[Cell]]:
        """The cells by group."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.group, []).append(cell)
        return groups


def geomean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def latest() -> Path:
    """The newest file in ``bench/results``.

    Raises:
        ValueError: If there is none.
    """
    files = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{RESULTS} must hold a file of results: run pytest bench/ --benchmark")
    return files[-1]


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _rounded(value: Any) -> Any:
    """Six digits are more than any clock is good for."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
