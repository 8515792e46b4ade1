"""The judge misses only what surely misses, and three times."""

import sys
from functools import partial

import pytest

from bench import check
from bench.cases import LIMITS, Limit
from bench.results import Results

NETWORK = Limit("network", "speedup", 2.2, only=(("kept", (0.3,)),))
BLOCK = Limit("block", "efficiency", 0.9, geomean=True)
OPTIONS = ["--groups=block,network,block_bf16,network_bf16,functional,linear,backward"]
COUNTED = Limit("block", "efficiency", 0.9, allowed=2)


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


@pytest.mark.parametrize(("below", "passes"), [(0, True), (2, True), (3, False), (5, False)])
def test_some_cells_may_lie_below(make_cell, below, passes):
    cells = [make_cell("block", (0.8, 0.7, 0.85), name=f"slow {i}") for i in range(below)]
    cells += [make_cell("block", (0.89, 0.87, 0.91), name=f"fast {i}") for i in range(5 - below)]
    (verdict,) = check.judge(cells, [COUNTED])
    assert (verdict.passes, verdict.below) == (passes, below)
    assert verdict.names == tuple(f"slow {i}" for i in range(below))
    assert f"block, all but 2: {below} below, 2 may be; efficiency of the next" in str(verdict)


def test_fewer_cells_than_may_lie_below_say_nothing(make_cell):
    assert check.judge([make_cell("block", (0.1, 0.1, 0.1))] * 2, [COUNTED]) == []


def test_a_miss_says_by_how_much(make_cell):
    missed, kept = check.judge(
        [make_cell("network", (1.98, 1.9, 2.1), 0.3, name="a"), make_cell("network", (2.3, 2.2, 2.4), 0.3, name="b")],
        [NETWORK],
    )
    assert str(missed) == "MISS a: speedup 1.980, at most 2.100, must reach 2.200: 10.0% short"
    assert str(kept) == "ok   b: speedup 2.300, at most 2.400, must reach 2.200"


def test_cells_without_a_fact_are_not_meant(make_cell):
    cell = make_cell("network", (1.0, 1.0, 1.0), 0.3)
    assert check.judge([cell], [Limit("network", "speedup", 2.0, only=(("cache", ("warm",)),))]) == []


def _judged(monkeypatch: pytest.MonkeyPatch, runs: list[list], *options: str) -> tuple[int, list[list[str]]]:
    """Run the judge on prepared measurements; return its exit status and what it asked for."""
    asked: list[list[str]] = []

    def measure(names, passed_on):
        assert passed_on == [*OPTIONS, *options]
        asked.append(list(names))
        return runs[len(asked) - 1]

    monkeypatch.setattr(check, "_measure", measure)
    monkeypatch.setattr(sys, "argv", ["check", *options])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    return stopped.value.code, asked


def test_one_miss_is_measured_again(make_cell, monkeypatch, capsys):
    slow, good = make_cell("network", (2.0, 1.9, 2.1), 0.3), make_cell("network", (2.8, 2.7, 2.9), 0.3)
    fine = make_cell("network", (1.0, 0.99, 1.01), 1.0)
    code, asked = _judged(monkeypatch, [[slow, fine], [good]], "--threads=1", "--seconds=0.5")
    assert (code, asked[1]) == (0, [slow.name])
    said = capsys.readouterr().out
    assert "2 of 2 limits kept" in said
    assert "not judged, no such cells: block (density 0.1): efficiency 0.700" in said


def test_only_the_cells_below_are_measured_again(make_cell, monkeypatch):
    def cell(i: int, value: float):
        return make_cell("block", (value,) * 3, name=f"cell {i}", density=0.5)

    first = [cell(i, 0.90 if i < 6 else 1.3) for i in range(30)]
    again = [cell(i, 0.90 if i < 4 else 1.3) for i in range(6)]
    monkeypatch.setattr(check, "judge", partial(check.judge, limits=LIMITS[1:2]))
    code, asked = _judged(monkeypatch, [first, again])
    assert (code, asked[1]) == (0, [f"cell {i}" for i in range(6)])
    code, asked = _judged(monkeypatch, [first, first[:6], first[:6]])
    assert (code, len(asked)) == (1, 3)


def test_three_misses_fail(make_cell, monkeypatch, capsys):
    slow = make_cell("network", (2.0, 1.9, 2.1), 0.3)
    code, asked = _judged(monkeypatch, [[slow]] * 3)
    assert (code, len(asked)) == (1, 3)
    assert (
        "MISS bench/test_network.py::test_network[0.3]: speedup 2.000, at most 2.100, must reach 2.700: 25.9% short"
        in (capsys.readouterr().out)
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
