"""Whole optimised networks, at the FLOPs of the budget and with every gate open."""

from typing import Any

import pytest

from bench.cases import NETWORKS, NetworkCase
from bench.trials import network_trial


@pytest.mark.parametrize("case", NETWORKS, indirect=True, ids=str)
def test_network(case: NetworkCase, run: Any, pytestconfig: pytest.Config) -> None:
    with network_trial(case, compiled=pytestconfig.getoption("benchmark")) as trial:
        run("network", case, trial)
