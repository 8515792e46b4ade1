"""The benchmarks are not installed: they are found in the checkout, behind everything installed."""

import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(str(CHECKOUT))

from bench.runner import Cell  # noqa: E402 - needs the path


@pytest.fixture(scope="session")
def make_cell():
    """Build a cell of a group from what matters in a test."""

    def make(group: str, speedup: tuple[float, float, float], kept: float = 1.0, name: str = "", **facts) -> Cell:
        facts = {"batch": 1, "model": "net", "size": 32, "dtype": "float32", "kept": kept, **facts}
        dense, gated = [speedup[0]] * 3, [1.0] * 3
        name = name or f"bench/test_{group}.py::test_{group}[{kept:g}]"
        return Cell(group, name, facts, "prepacked", 20, kept, dense, gated, list(speedup), speedup[0] * kept)

    return make
