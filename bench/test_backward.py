"""Backward passes of functional calls with given masks, against that of the masked dense computation."""

from typing import Any

import pytest

from bench.backward import backward_trial
from bench.cases import GROUPS, BackwardCase


@pytest.mark.parametrize("case", GROUPS["backward"], indirect=True, ids=str)
def test_backward(case: BackwardCase, run: Any) -> None:
    with backward_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["backward_one"], indirect=True, ids=str)
def test_backward_one(case: BackwardCase, run: Any) -> None:
    with backward_trial(case) as trial:
        run(case, trial)
