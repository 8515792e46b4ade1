"""Tables of a benchmark's rows: sums of stages, and the fastest way through every case."""

import json
from pathlib import Path

import pytest

from bench import gpu_summary
from bench.gpu import Row


def rows(channels: int, size: int, dense: float, **ours: float) -> list[dict]:
    """Of one block, as they are stored: a dense way, a masked one, and ours."""
    facts = {"channels": channels, "size": size, "batch": 256, "kept": 0.3, "masks": "independent", "dtype": "bfloat16"}
    ways = {"cudnn": dense, "masked": 3.0, "triton": ours.pop("alone", None), "triton, 2 samples a list": 0.9, **ours}
    return [
        Row("blocks", facts, way, [ms] * 3 if ms else [], dense / ms if ms else None, "" if ms else "refused")._asdict()
        for way, ms in ways.items()
    ]


ROWS = [*rows(64, 32, 2.0, alone=1.0), *rows(128, 16, 1.0, alone=0.5), *rows(64, 56, 1.0)]


def test_the_fastest_of_our_ways_counts():
    points = gpu_summary.fastest(ROWS)
    first, second, third = points.values()
    assert (first.way, second.way, third.way) == ("triton, 2 samples a list", "triton", "triton, 2 samples a list")
    assert (first.dense, first.ours) == (pytest.approx(2.0), 0.9) and second.speedup == pytest.approx(2)


def test_stages_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": ROWS}))
    assert gpu_summary.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "| 32×32 | independent | 0.3 | 2 | 2.14 |" in shown  # 3 ms to 1.4
    assert "| 224×224 | independent | 0.3 | 1 | 1.11 |" in shown
    assert "| blocks | 128 16 256 0.3 independent bfloat16 | triton | 1 | 0.5 | 2.00 |" in shown
    assert "blocks 64 56 256 0.3 independent bfloat16 triton: refused" in shown
