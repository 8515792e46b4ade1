"""The line through a block's times."""

import pytest

from bench.growth import KINDS, fit, times


def test_a_line_is_found():
    r2, intercept = fit([0.25, 0.5, 1.0], [2.0, 3.0, 5.0])
    assert (r2, intercept) == (pytest.approx(1), pytest.approx(0.2))
    r2, _ = fit([0.25, 0.5, 1.0], [2.0, 5.0, 3.0])
    assert r2 < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_measured(kind: str):
    kept, milliseconds = times(16, 8, kind, rounds=1)
    assert len(kept) == len(milliseconds) == (7 if kind == "tiles" else 9)
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(1, rel=0.01)  # the gate comes on top
    assert min(milliseconds) > 0
