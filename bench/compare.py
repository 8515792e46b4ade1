"""What got slower from one file of results to another: ``python -m bench.compare BEFORE.json AFTER.json``."""

import argparse
from pathlib import Path
from typing import NamedTuple

from bench.results import Results

# Less is weather.
_TOLERANCE = 0.03


class Change(NamedTuple):
    """How a cell changed.

    Attributes:
        name: The test.
        before: Speed-up over the dense way, before.
        after: The same, after.
        gated: Gated milliseconds after over before.
        dense: Dense milliseconds after over before: what the machine did meanwhile.
        verdict: "slower", "faster" or "same".
    """

    name: str
    before: float
    after: float
    gated: float
    dense: float
    verdict: str


def compare(before: Results, after: Results) -> list[Change]:
    """Compare the cells that both have, the worst first.

    Speed-ups are compared, because the dense way was timed in the same rounds: a machine that got slower slows both.
    A cell changed if the intervals of its speed-ups do not touch, and it differs by more than 3 %.
    """
    befores = {cell.name: cell for cell in before.cells}
    changes = []
    for new in after.cells:
        old = befores.get(new.name)
        if old is None:
            continue
        (was, was_low, was_high), (now, now_low, now_high) = old.speedup, new.speedup
        verdict = "same"
        if now_high < was_low and now < was * (1 - _TOLERANCE):
            verdict = "slower"
        elif now_low > was_high and now > was * (1 + _TOLERANCE):
            verdict = "faster"
        gated, dense = new.gated_ms[0] / old.gated_ms[0], new.dense_ms[0] / old.dense_ms[0]
        changes.append(Change(new.name, was, now, gated, dense, verdict))
    return sorted(changes, key=lambda change: change.after / change.before)


def main() -> None:
    """Say what got slower between two files of results; exit with 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=main.__doc__)
    parser.add_argument("before", type=Path, help="file of results")
    parser.add_argument("after", type=Path, help="file of results")
    arguments = parser.parse_args()
    try:
        before, after = Results.load(arguments.before), Results.load(arguments.after)
    except ValueError as error:
        parser.error(str(error))
    for name in ("machine", "versions"):
        if getattr(before, name) != getattr(after, name):
            print(f"note: {name} differ: {getattr(before, name)}, {getattr(after, name)}")
    changes = compare(before, after)
    for change in changes:
        if change.verdict != "same":
            print(
                f"{change.verdict}: {change.name}: speed-up {change.before:.2f}× to {change.after:.2f}× "
                f"(gated ms ×{change.gated:.2f}, dense ms ×{change.dense:.2f})"
            )
    slower = sum(change.verdict == "slower" for change in changes)
    faster = sum(change.verdict == "faster" for change in changes)
    print(f"{before.commit} to {after.commit}: {slower} slower, {faster} faster, {len(changes)} cells in both")
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
