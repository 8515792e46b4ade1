"""The least time of a block."""

import sys

import pytest

from bench import roofline
from bench.results import Results
from bench.roofline import Bound, Machine, bound

MACHINE = Machine({"float32": 2e11, "bfloat16": 4e11}, bandwidth=2e10, cache=32 << 20, call=2e-5)
FACTS = {
    "channels": 64,
    "size": 32,
    "batch": 16,
    "density": 0.25,
    "dtype": "float32",
    "cache": "warm",
}


def test_what_stays_in_the_cache_is_free():
    least = bound(FACTS, 0.25, MACHINE)
    operations = 2 * 2 * 16 * 64 * 64 * (3 * 30 + 2 * 2) ** 2 * 0.25  # inner rows have three taps, the outer ones two
    assert least == Bound(pytest.approx(operations / 2e11), 0.0, 0.0, 2e-5)
    assert least.total == least.arithmetic + least.call
    narrow = bound({**FACTS, "dtype": "bfloat16"}, 0.25, MACHINE)
    assert narrow.arithmetic == pytest.approx(least.arithmetic / 2)


def test_open_weights_of_one_image_and_of_many():
    large = {**FACTS, "channels": 512, "size": 4, "batch": 1}
    one, many = bound(large, 0.25, MACHINE), bound({**large, "batch": 16}, 0.25, MACHINE)
    weights, image = 2 * 9 * 512 * 512 * 4, 512 * 4 * 4 * 4
    assert one.memory == pytest.approx((weights / 4 + 3 * image) / 2e10)
    assert many.memory == pytest.approx((weights * (1 - 0.75**16) + 48 * image) / 2e10)
    assert one.gate == many.gate == 2 * 512 * 128 * 4 / 2e10


def test_it_prints_a_row_for_each_block(make_cell, tmp_path, monkeypatch, capsys):
    facts = {key: value for key, value in FACTS.items() if key != "density"}
    cells = [
        make_cell("block", (2.0, 1.9, 2.1), 0.25, density=0.25, **facts),
        make_cell("network", (2.5, 2.4, 2.6), 0.3),
    ]
    path = Results.here(cells).save(tmp_path / "results.json")
    monkeypatch.setattr(Machine, "here", lambda: MACHINE)
    monkeypatch.setattr(sys, "argv", ["roofline", str(path), "--below", "0.95"])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "200 GFLOP/s in float32, 400 GFLOP/s in bfloat16; 20.0 GB/s; a call 20 µs"
    assert len(lines) == 5
    assert lines[4].startswith("| 64, 32×32, 16 | 0.25 |")
