"""Optimised blocks: eight shapes, two batch sizes, six densities; other masks; weights and images in memory."""

from typing import Any

import pytest

from bench.cases import GROUPS, BlockCase, BottleneckCase
from bench.trials import block_trial, bottleneck_trial


@pytest.mark.parametrize("case", GROUPS["block"], indirect=True, ids=str)
def test_block(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["masks"], indirect=True, ids=str)
def test_masks(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["cold"], indirect=True, ids=str)
def test_cold(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["block_bf16"], indirect=True, ids=str)
def test_block_bf16(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run(case, trial)


@pytest.mark.parametrize("case", GROUPS["bottleneck"], indirect=True, ids=str)
def test_bottleneck(case: BottleneckCase, run: Any) -> None:
    with bottleneck_trial(case) as trial:
        run(case, trial)
