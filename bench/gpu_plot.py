"""Pictures of a GPU benchmark: ``python -m bench.gpu_plot results.json`` writes them beside it."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_NOT_CURVES = ("kept", "masks")


def plots(rows: Sequence[Any], out: Path) -> list[Path]:
    """Draw speed-up over the best dense way against what is kept: a picture a case, a curve a way and mask model.

    Without matplotlib there are none: it is not needed where the numbers are made.

    Args:
        rows: With the attributes of a row of the benchmark.
        out: The folder.

    Returns:
        The files, ``<part>-<case>.png``.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    cases: dict[str, list[Any]] = {}
    for row in rows:
        if row.speedup is not None and "kept" in row.facts:
            name = "-".join(str(value) for key, value in row.facts.items() if key not in _NOT_CURVES)
            cases.setdefault(f"{row.part}-{name}", []).append(row)
    return [_draw(name, found, out / f"{name}.png") for name, found in cases.items()]


def _draw(name: str, rows: Sequence[Any], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = ", ".join(filter(None, (row.way, row.facts.get("masks", ""))))
        curves.setdefault(label, []).append((row.facts["kept"], row.speedup))
    figure = Figure(figsize=(8.5, 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.2, label=label)
    axes.axhline(1, color="#9a9a9a", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("channels kept")
    axes.set_ylabel("speed-up over the best dense way (×)")
    axes.set_title(name, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, format="png")
    return path


if __name__ == "__main__":
    results = Path(sys.argv[1])
    read = [SimpleNamespace(**row) for row in json.loads(results.read_text())["rows"]]
    print(*plots(read, results.parent), sep="\n")
