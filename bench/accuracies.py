"""Accuracies of several runs of slimmable networks as one table: mean and standard deviation over their seeds.

``python -m bench.accuracies runs/*`` reads what ``gatedkernels evaluate`` left in the folders.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PIXELS, UNTRAINED = "raw pixels", "untrained"
# (name, width or None for all widths) -> seed -> accuracy
Cells = dict[tuple[str, float | None], dict[int, float]]


def gather(evaluations: Iterable[Mapping[str, Any]], measure: str) -> Cells:
    """Sort the accuracies of runs by what was measured.

    Args:
        evaluations: Contents of ``evaluation.json``.
        measure: Which accuracy.

    Raises:
        ValueError: If two runs of one method and seed disagree about a width: they are not runs of one table.
    """
    cells: Cells = {}

    def put(name: str, width: float | None, seed: int, value: float) -> None:
        earlier = cells.setdefault((name, width), {}).setdefault(seed, value)
        if earlier != value:
            raise ValueError(f"runs must differ in method, width or seed, got {name} at {width} of seed {seed} twice")

    for run in evaluations:
        put(PIXELS, None, run["seed"], run["accuracy"]["pixels"][measure])
        for row in run["widths"]:
            put(run["method"], row["width"], run["seed"], row["accuracy"][measure])
            put(UNTRAINED, row["width"], run["seed"], row["random_init"][measure])
    return cells


def table(cells: Cells) -> str:
    """Lay out one row a method and one column a width, in percent; behind each mean its standard deviation."""
    widths = sorted({width for _, width in cells if width is not None})
    names = [*dict.fromkeys(name for name, _ in cells if name not in (PIXELS, UNTRAINED)), UNTRAINED, PIXELS]
    lines = [f"| method | {' | '.join(f'{width:g}' for width in widths)} |", "| --- |" + " ---: |" * len(widths)]
    for name in names:
        found = [cells.get((name, width), cells.get((name, None), {})) for width in widths]
        lines.append(f"| {name} | {' | '.join(_cell(list(each.values())) for each in found)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    text = f"{100 * statistics.fmean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.1f} ({len(values)})"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluated runs")
    parser.add_argument("--measure", default="linear", help="which accuracy")
    chosen = parser.parse_args(arguments)
    files = [run / "evaluation.json" for run in chosen.runs]
    print(table(gather((json.loads(file.read_text()) for file in files if file.exists()), chosen.measure)))


if __name__ == "__main__":
    main()
