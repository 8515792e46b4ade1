"""Two states of the project in turn."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.versus import work

ROOT = Path(__file__).parents[2]


def test_a_state_against_itself():
    command = [sys.executable, "-m", "bench.versus", str(ROOT), str(ROOT), "block:16,6,1,0.5", "--rounds", "4"]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    case, _, rest = done.stdout.partition(": ")
    assert case == "block:16,6,1,0.5"
    numbers = [float(part.split()[0]) for part in rest.replace("ratio ", "").split(", ")]
    assert len(numbers) == 3
    assert min(numbers) > 0


def test_an_unknown_case():
    with pytest.raises(ValueError, match="a case must begin with block, block_bf16, network or network_bf16"):
        work(["layer:3"])
