"""The speed-up plot."""

import subprocess
import sys
from pathlib import Path

import pytest

from gatedkernels.reporting import speedup_plot

pytest.importorskip("matplotlib")

ROW = {"device": "cpu", "dtype": "float32", "threads": 2, "width": 1.0, "masks": "set", "batch": 1}


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "kept": 0.3, "speedup": 2.5}],
        [{**ROW, "batch": batch, "kept": k, "speedup": 0.9 / k} for batch in (1, 16) for k in (1.0, 0.2, 0.5)],
        [{**ROW, "masks": "trained", "threads": threads, "kept": 1.01, "speedup": 0.9} for threads in (1, 2)],
        [{"label": f"series {i}", "kept": 0.05, "speedup": 18.0} for i in range(9)],
    ],
    ids=["point", "curves", "open", "labels"],
)
def test_draws_a_picture(rows, tmp_path: Path):
    speedup_plot(rows, tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_labels_say_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    speedup_plot([{**ROW, "kept": 0.3, "speedup": 2.5}], tmp_path / "speedup.png")
    axes = drawn[0].axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["width 1, set masks, batch 1", "proportional to FLOPs"]
    assert axes.get_title(loc="left") == "Measured speed-up · cpu, float32, 2 threads"
    assert "×" in axes.get_ylabel() and "executed / dense" in axes.get_xlabel()
    line = axes.lines[0]
    assert all(y == pytest.approx(1 / x) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_no_rows():
    with pytest.raises(ValueError, match="rows must hold at least one measurement, got none"):
        speedup_plot([], "speedup.png")


@pytest.mark.parametrize(("line", "loads"), [("import gatedkernels.reporting", False), ("import matplotlib", True)])
def test_matplotlib_is_imported_late(line, loads, tmp_path: Path):
    code = f"import sys; {line}; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(loads)
