"""Whole optimised networks, at the FLOPs of the budget and with every gate open, against every engine there is."""

from typing import Any

import pytest

from bench.cases import GROUPS, NetworkCase
from bench.trials import network_trial


@pytest.mark.parametrize("case", GROUPS["network"], indirect=True, ids=str)
def test_network(case: NetworkCase, run: Any, pytestconfig: pytest.Config) -> None:
    with network_trial(case, complete=pytestconfig.getoption("benchmark")) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["network_bf16"], indirect=True, ids=str)
def test_network_bf16(case: NetworkCase, run: Any, pytestconfig: pytest.Config) -> None:
    with network_trial(case, complete=pytestconfig.getoption("benchmark")) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["network_50"], indirect=True, ids=str)
def test_network_50(case: NetworkCase, run: Any, pytestconfig: pytest.Config) -> None:
    with network_trial(case, complete=pytestconfig.getoption("benchmark")) as trial:
        run(case, trial)
