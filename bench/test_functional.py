"""Functional calls, which pack nothing beforehand and must never be slower than the dense way."""

from typing import Any

import pytest

from bench.cases import GROUPS, FunctionalCase, PointwiseCase
from bench.trials import functional_trial, pointwise_trial


@pytest.mark.parametrize("case", GROUPS["functional"], indirect=True, ids=str)
def test_functional(case: FunctionalCase, run: Any) -> None:
    with functional_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["pointwise"], indirect=True, ids=str)
def test_pointwise(case: PointwiseCase, run: Any) -> None:
    with pointwise_trial(case) as trial:
        run(case, trial)
