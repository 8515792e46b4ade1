"""The judge misses only what surely misses, and three times."""

import sys

import pytest

from bench import check
from bench.cases import Limit
from bench.results import Results

NETWORK = Limit("network", "speedup", 2.2, only=(("kept", 0.3),))
BLOCK = Limit("block", "efficiency", 0.9, geomean=True)


@pytest.mark.parametrize(("high", "passes"), [(2.1, False), (2.2, True), (2.5, True)])
def test_the_upper_bound_decides(make_cell, high, passes):
    (verdict,) = check.judge([make_cell("network", (2.0, 1.9, high), 0.3)], [NETWORK])
    assert (verdict.passes, verdict.value, verdict.high) == (passes, 2.0, high)


def test_only_what_is_meant_is_judged(make_cell):
    cells = [make_cell("network", (1.0, 1.0, 1.0), 1.0), make_cell("block", (0.1, 0.1, 0.1))]
    assert check.judge(cells, [NETWORK]) == []


def test_geomean_and_its_bound(make_cell):
    cells = [make_cell("block", (speedup, speedup * 0.9, speedup / 0.9), 0.5) for speedup in (1.6, 1.8) * 8]
    (verdict,) = check.judge(cells, [BLOCK])
    assert verdict.value == pytest.approx((0.8 * 0.9) ** 0.5)
    # Sixteen cells are surer than one, by the root of sixteen.
    assert verdict.high / verdict.value == pytest.approx((1 / 0.9) ** (1 / 4))
    assert verdict.passes == (verdict.high >= 0.9)
    assert len(verdict.names) == 16


def _judged(monkeypatch: pytest.MonkeyPatch, runs: list[list]) -> tuple[int, list[list[str]]]:
    """Run the judge on prepared measurements; return its exit status and what it asked for."""
    asked: list[list[str]] = []

    def measure(names):
        asked.append(list(names))
        return runs[len(asked) - 1]

    monkeypatch.setattr(check, "_measure", measure)
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    return stopped.value.code, asked


def test_one_miss_is_measured_again(make_cell, monkeypatch, capsys):
    slow, good = make_cell("network", (2.0, 1.9, 2.1), 0.3), make_cell("network", (2.3, 2.2, 2.4), 0.3)
    fine = make_cell("network", (1.0, 0.99, 1.01), 1.0)
    code, asked = _judged(monkeypatch, [[slow, fine], [good]])
    assert (code, asked[1]) == (0, [slow.name])
    assert "2 of 2 limits kept" in capsys.readouterr().out


def test_three_misses_fail(make_cell, monkeypatch, capsys):
    slow = make_cell("network", (2.0, 1.9, 2.1), 0.3)
    code, asked = _judged(monkeypatch, [[slow]] * 3)
    assert (code, len(asked)) == (1, 3)
    assert "MISS bench/test_network.py::test_network[0.3]: speedup 2.000, at most 2.100, must reach 2.200" in (
        capsys.readouterr().out
    )


def test_nothing_judged_is_no_pass(make_cell, monkeypatch):
    code, _ = _judged(monkeypatch, [[make_cell("masks", (1.0, 1.0, 1.0))]])
    assert code == "error: the results hold no cell that a limit speaks of"


def test_judges_a_file(make_cell, monkeypatch, tmp_path):
    path = Results.here([make_cell("network", (2.0, 1.9, 2.1), 0.3)]).save(tmp_path / "results.json")
    monkeypatch.setattr(sys, "argv", ["check", str(path)])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    assert stopped.value.code == 1
