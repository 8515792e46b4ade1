"""What a GPU benchmark comes to: ``python -m bench.gpu_summary results.json ...`` prints tables for the documents.

Speed-ups of our fastest way over the best dense one, for the stages of a network together and for each case, and which
way that is.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import SHAPES

STAGES = {"32×32": SHAPES[:4], "224×224": SHAPES[4:]}
_OTHERS = ("cudnn", "compiled", "masked", "reference")  # what ways are called that are not ours


class Point(NamedTuple):
    """A case: milliseconds of the best dense way and of our fastest one, and which that is."""

    dense: float
    ours: float
    way: str

    @property
    def speedup(self) -> float:
        """Of our way."""
        return self.dense / self.ours


def fastest(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], Point]:
    """The fastest of our ways through every case that was measured beside a dense one, by part and facts."""
    points: dict[tuple[Any, ...], Point] = {}
    for row in rows:
        if row["speedup"] and row["part"] != "tuning" and not row["way"].startswith(_OTHERS):
            key = (row["part"], *row["facts"].values())
            ms = row["ms"][0]
            if key not in points or ms < points[key].ours:
                points[key] = Point(ms * row["speedup"], ms, row["way"])
    return points


def stages(points: Mapping[tuple[Any, ...], Point]) -> str:
    """Sums over the stages of a ResNet-18, blocks of 256 images, by mask model and what is kept."""
    found: dict[tuple[str, str, float], list[Point]] = {}
    for (part, *facts), point in points.items():
        if part == "blocks":
            channels, size, _, kept, masks, _ = facts
            name = next((name for name, shapes in STAGES.items() if (channels, size) in shapes), "others")
            found.setdefault((name, masks, kept), []).append(point)
    rows = [
        (name, masks, f"{kept:g}", len(of), f"{sum(p.dense for p in of) / sum(p.ours for p in of):.2f}")
        for (name, masks, kept), of in sorted(found.items())
    ]
    return _table(("images", "masks", "kept", "stages", "speed-up"), rows)


def cases(points: Mapping[tuple[Any, ...], Point]) -> str:
    """Every case with the way that was fastest there, and by how much."""
    rows = [
        (part, " ".join(f"{fact:g}" if isinstance(fact, float) else str(fact) for fact in facts), p.way,
         f"{p.dense:.4g}", f"{p.ours:.4g}", f"{p.speedup:.2f}")
        for (part, *facts), p in points.items()
    ]  # fmt: skip
    return _table(("part", "case", "fastest way", "dense ms", "ms", "speed-up"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(paths: Sequence[str]) -> int:
    """Run the command line: files of one machine, a part of the benchmark in each or several."""
    rows = [row for path in paths for row in json.loads(Path(path).read_text())["rows"]]
    points = fastest(rows)
    print(stages(points), cases(points), sep="\n\n")
    for row in rows:
        if row["note"] and not row["speedup"]:
            print(f"\n{row['part']} {' '.join(map(str, row['facts'].values()))} {row['way']}: {row['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
