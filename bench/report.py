"""A file of results as Markdown tables and pictures: ``python -m bench.report [FILE]``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import Results, geomean, latest
from bench.runner import Cell
from gatedkernels.reporting import speedup_plot

_NUMBERS = ("kept", "dense ms", "gated ms", "speed-up", "efficiency", "baseline")
_PARTS = ("algorithm", "gating")
# Where kept lies in the facts, and so needs no column.
_HIDDEN = {"density", "kept"}
# Facts that differ between a cell and the one with every gate open.
_GATING = {*_HIDDEN, "masks"}
# Functional calls choose their algorithm by density: with every gate open it is another, and nothing to divide by.
_UNDIVIDED = {"functional", "pointwise", "backward", "backward_one"}


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
    parts = split(results.cells)
    for group, cells in results.groups().items():
        lines += ["", f"**{group}**", "", *_table(cells, parts)]
    lines += _ways(results.cells)
    lines += [
        "",
        "Milliseconds are medians, with quartiles for the gated ones; the speed-up's bounds hold with 95 % confidence "
        "each; efficiency is speed-up × kept.",
    ]
    if parts:
        lines[-1] += (
            " Algorithm is the speed-up with every gate open, gating what closing gates adds to it: their product is "
            "the speed-up."
        )
    missing = {name: reason for cell in results.cells for name, reason in cell.missing.items()}
    lines += ["", *(f"Not tried: {name} ({reason})." for name, reason in sorted(missing.items()))] if missing else []
    return "\n".join(lines)


def split(cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """Split speed-ups into what the algorithm gains with every gate open, and what gating adds.

    Both speed-ups were measured against the same dense way on the same shape and batch, each in rounds of its own, so
    that a machine that got slower in between slowed both sides of each.

    Returns:
        By name of the cell, for those with a counterpart whose gates are all open: the speed-up of that one, and the
        factor by which the cell's own is larger.
    """
    opened = {_setting(cell): cell.speedup[0] for cell in cells if _is_open(cell)}
    return {
        cell.name: (opened[_setting(cell)], cell.speedup[0] / opened[_setting(cell)])
        for cell in cells
        if cell.group not in _UNDIVIDED and _setting(cell) in opened
    }


def _setting(cell: Cell) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in cell.facts.items() if name not in _GATING)


def _is_open(cell: Cell) -> bool:
    density = cell.facts.get("density", cell.facts.get("kept"))
    return cell.group not in _UNDIVIDED and density == 1 and cell.facts.get("masks", "exact") == "exact"


def plots(results: Results, stem: Path) -> list[Path]:
    """Draw speed-up against kept, a picture for every group, operation and batch size; return the files."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    for cell in results.cells:
        facts = (cell.group, *(cell.facts.get(name) for name in ("operation", "dtype")), f"n{cell.facts['batch']}")
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


def _table(cells: Sequence[Cell], parts: Mapping[str, tuple[float, float]]) -> list[str]:
    facts = [name for name in cells[0].facts if name not in _HIDDEN]
    facts = [name for name in facts if len({cell.facts[name] for cell in cells}) > 1]
    divided = any(cell.name in parts for cell in cells)
    columns = (*facts, *_NUMBERS[:-1], *(_PARTS if divided else ()), _NUMBERS[-1])
    lines = [f"| {' | '.join(columns)} |", f"|{' ---: |' * (len(columns) - 1)} --- |"]
    for cell in cells:
        middle, low, high = cell.gated_ms
        ratio, least, most = cell.speedup
        numbers = [
            f"{cell.kept:.3f}",
            f"{cell.dense_ms[0]:.3f}",
            f"{middle:.3f} ({low:.3f} … {high:.3f})",
            f"{ratio:.2f}× ({least:.2f} … {most:.2f})",
            f"{cell.efficiency:.3f}",
        ]
        if divided:
            numbers += [f"{part:.2f}×" for part in parts[cell.name]] if cell.name in parts else ["", ""]
        values = (*(str(cell.facts[name]) for name in facts), *numbers, cell.baseline)
        lines.append(f"| {' | '.join(values)} |")
    return lines


def _ways(cells: Sequence[Cell]) -> list[str]:
    """A list of all dense ways of whole networks, the fastest first."""
    networks: dict[tuple[tuple[str, Any], ...], Cell] = {}
    for cell in cells:
        if cell.group == "network" and cell.ways_ms:
            networks.setdefault(_setting(cell), cell)
    if not networks:
        return []
    lines = ["", "Dense networks, milliseconds; those far behind in three calls were timed no further:", ""]
    for cell in networks.values():
        ways = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(cell.ways_ms.items(), key=lambda way: way[1]))
        lines.append(f"- {', '.join(f'{name} {value}' for name, value in _setting(cell))}: {ways}")
    return lines


def _label(cell: Cell) -> str:
    """What tells a curve from the others of its picture."""
    facts = cell.facts
    if "channels" not in facts:
        return f"{facts['model']} at {facts['size']}²"
    if "size" not in facts:
        return f"{facts['channels']} units, {facts['tokens']} tokens, {facts['gated']}, {facts['baseline']}"
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
