"""Optimised basic blocks: eight shapes, two batch sizes, five densities, and masks that are not uniform."""

from typing import Any

import pytest

from bench.cases import BLOCKS, BlockCase, mask_cases
from bench.replay import recordings
from bench.trials import block_trial


@pytest.mark.parametrize("case", BLOCKS, indirect=True, ids=str)
def test_block(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run("block", case, trial)


@pytest.mark.parametrize("case", mask_cases(recordings()), indirect=True, ids=str)
def test_masks(case: BlockCase, run: Any) -> None:
    with block_trial(case) as trial:
        run("masks", case, trial)
