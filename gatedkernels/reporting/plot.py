"""What the FLOPs bought, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT = "#222222", "#9a9a9a"
_COLORS = ("#0b6e99", "#d1495b", "#3c8d53", "#7b5ea7", "#c77b1e", "#57606a", "#2a9d8f", "#a83279")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")


def speedup_plot(rows: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Plot measured speed-up against the fraction of FLOPs kept, beside the line that is proportional to FLOPs.

    Rows that differ in nothing but ``kept`` are joined to a curve.

    Args:
        rows: From `latency_rows`, any number of networks, batch sizes and kept fractions; ``label`` in a row replaces
            the name that is made from its facts.
        path: The PNG file.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one measurement, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(_label(row), []).append((row["kept"], row["speedup"]))
    least = min(0.25, min(row["kept"] for row in rows) * 0.85)
    kept = [least + (1 - least) * step / 200 for step in range(201)]
    axes.plot(kept, [1 / value for value in kept], color=_FAINT, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.plot((least, 1), (1, 1), color=_FAINT, linewidth=0.8)
    axes.set_xlim(least - 0.02, 1.3)
    axes.set_ylim(0, max(1 / least, *(row["speedup"] for row in rows)) * 1.08)
    ends = [(kept[6], 1 / kept[6], "proportional to FLOPs", _FAINT)]
    for i, (name, points) in enumerate(series.items()):
        points.sort()
        color = _COLORS[i % len(_COLORS)]
        axes.plot(*zip(*points, strict=True), color=color, marker=_MARKERS[i % len(_MARKERS)], markersize=5.5, zorder=3)
        ends.append((*points[-1], name, color))
    _place_labels(axes, ends)
    axes.set_xticks([tick / 10 for tick in range(1, 11) if tick / 10 >= least])
    axes.set_xlabel("FLOPs kept (executed / dense)", color=_INK)
    axes.set_ylabel("speed-up over the best dense PyTorch (×)", color=_INK)
    axes.set_title(_title(rows), loc="left", fontsize=10, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    figure.savefig(path, format="png")


def _place_labels(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each name to the right of its point, moved up where names would overlap."""
    height = 0.05 * axes.get_ylim()[1]
    taken: list[tuple[float, float]] = []
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        level = y
        while any(abs(level - other) < height and abs(x - left) < 0.35 for left, other in taken):
            level += height / 4
        taken.append((x, level))
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        axes.text(x + 0.02, level, name, color=color, fontsize=8.5, va="center", bbox=ground)


def _label(row: Mapping[str, Any]) -> str:
    if "label" in row:
        return str(row["label"])
    masks = {"trained": "trained masks", "set": "set masks"}[row["masks"]]
    return f"width {row['width']:g}, {masks}, batch {row['batch']}"


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    """The facts that all rows share."""
    facts = []
    for name, text in (("device", "{}"), ("dtype", "{}"), ("threads", "{} threads")):
        values = {row.get(name) for row in rows}
        if len(values) == 1 and None not in values:
            facts.append(text.format(values.pop()).replace("1 threads", "1 thread"))
    return "Measured speed-up" + (f" · {', '.join(facts)}" if facts else "")
