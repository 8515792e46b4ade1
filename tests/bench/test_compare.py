"""What got slower between two files."""

import sys

import pytest

from bench import compare
from bench.results import Results


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((2.0, 1.9, 2.1), "same"),
        ((1.5, 1.4, 1.6), "slower"),
        ((2.5, 2.4, 2.6), "faster"),
        ((1.85, 1.7, 1.95), "same"),  # the intervals touch
    ],
)
def test_verdicts(make_cell, after, verdict):
    old = Results.here([make_cell("network", (2.0, 1.9, 2.1), 0.3), make_cell("network", (1.0, 1.0, 1.0), 1.0)])
    new = Results.here([make_cell("network", after, 0.3)])
    (change,) = compare.compare(old, new)
    assert (change.verdict, change.before, change.after) == (verdict, 2.0, after[0])


def test_less_than_three_percent_is_weather(make_cell):
    old = Results.here([make_cell("network", (2.0, 1.999, 2.001), 0.3)])
    (change,) = compare.compare(old, Results.here([make_cell("network", (1.95, 1.949, 1.951), 0.3)]))
    assert change.verdict == "same"


@pytest.mark.parametrize(("speedup", "status"), [(1.5, 1), (2.5, 0)])
def test_command(make_cell, monkeypatch, tmp_path, capsys, speedup, status):
    before = Results.here([make_cell("network", (2.0, 2.0, 2.0), 0.3)]).save(tmp_path / "before.json")
    after = Results.here([make_cell("network", (speedup,) * 3, 0.3)]).save(tmp_path / "after.json")
    monkeypatch.setattr(sys, "argv", ["compare", str(before), str(after)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == status
    assert f"{status} slower, {1 - status} faster, 1 cells in both" in capsys.readouterr().out
