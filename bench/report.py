"""A file of results as Markdown tables and pictures: ``python -m bench.report [FILE]``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Results, geomean, latest
from bench.runner import Cell
from gatedkernels.reporting import speedup_plot

_NUMBERS = ("kept", "dense ms", "gated ms", "speed-up", "efficiency", "baseline")
# Where kept lies in the facts, and so needs no column.
_HIDDEN = {"density", "kept"}


def markdown(results: Results) -> str:
    """Write results as Markdown: a summary of each group, then its cells."""
    machine = results.machine
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}; "
        + ", ".join(f"{name} {version}" for name, version in results.versions.items())
        + f"; commit {results.commit}; {results.date}",
        "",
        "| group | cells | geomean speed-up | geomean efficiency | least efficiency |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for group, cells in results.groups().items():
        efficiencies = [cell.efficiency for cell in cells]
        speedup = geomean([cell.speedup[0] for cell in cells])
        lines.append(
            f"| {group} | {len(cells)} | {speedup:.2f}× | {geomean(efficiencies):.3f} | {min(efficiencies):.3f} |"
        )
    for group, cells in results.groups().items():
        lines += ["", f"**{group}**", "", *_table(cells)]
    lines += [
        "",
        "Milliseconds are medians, with quartiles for the gated ones; the speed-up's bounds hold with 95 % confidence "
        "each; efficiency is speed-up × kept.",
    ]
    return "\n".join(lines)


def plots(results: Results, stem: Path) -> list[Path]:
    """Draw speed-up against kept, a picture for every group, operation and batch size; return the files."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    for cell in results.cells:
        facts = (cell.group, cell.facts.get("operation"), f"n{cell.facts['batch']}")
        row = {
            "label": _label(cell),
            "kept": cell.kept,
            "speedup": cell.speedup[0],
            "threads": results.machine["threads"],
            "device": f"{cell.group}, batch {cell.facts['batch']}",
        }
        pictures.setdefault("-".join(filter(None, facts)), []).append(row)
    files = []
    for name, rows in pictures.items():
        files.append(stem.with_name(f"{stem.name}-{name}.png"))
        speedup_plot(rows, files[-1])
    return files


def _table(cells: Sequence[Cell]) -> list[str]:
    facts = [name for name in cells[0].facts if name not in _HIDDEN]
    facts = [name for name in facts if len({cell.facts[name] for cell in cells}) > 1]
    lines = [f"| {' | '.join((*facts, *_NUMBERS))} |", f"|{' ---: |' * (len(facts) + len(_NUMBERS) - 1)} --- |"]
    for cell in cells:
        middle, low, high = cell.gated_ms
        ratio, least, most = cell.speedup
        numbers = (
            f"{cell.kept:.3f}",
            f"{cell.dense_ms[0]:.3f}",
            f"{middle:.3f} ({low:.3f} … {high:.3f})",
            f"{ratio:.2f}× ({least:.2f} … {most:.2f})",
            f"{cell.efficiency:.3f}",
            cell.baseline,
        )
        lines.append(f"| {' | '.join((*(str(cell.facts[name]) for name in facts), *numbers))} |")
    return lines


def _label(cell: Cell) -> str:
    """What tells a curve from the others of its picture."""
    facts = cell.facts
    if "channels" not in facts:
        return str(facts["model"])
    extra = (facts[name] for name in ("layout", "masks") if name in facts and facts[name] != "exact")
    return ", ".join((f"{facts['channels']} at {facts['size']}²", *extra))


def main() -> None:
    """Write ``<FILE>.md`` and its pictures beside a file of results, the newest one by default."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="file of results")
    path = parser.parse_args().file
    try:
        path = path or latest()
        results = Results.load(path)
    except ValueError as error:
        parser.error(str(error))
    text = markdown(results)
    target = path.with_suffix(".md")
    target.write_text(text + "\n")
    print(text)
    print(f"\nWritten: {', '.join(map(str, (target, *plots(results, path.with_suffix('')))))}")


if __name__ == "__main__":
    main()
