"""Linear layers with gated hidden units: functional calls, which pack nothing beforehand."""

from typing import Any

import pytest
import torch

from bench.cases import LINEARS, LinearCase
from bench.linear import linear_trial


@pytest.mark.parametrize("case", LINEARS, indirect=True, ids=str)
def test_linear(case: LinearCase, run: Any) -> None:
    if case.baseline == "prepacked" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    with linear_trial(case) as trial:
        run(case, trial)
