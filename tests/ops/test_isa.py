"""Every instruction set that this processor has computes the same, and reads what it was given.

GATEDKERNELS_ISA caps the choice. The sweeps run in processes of their own: the set is chosen once in each, and a read
from forbidden memory ends it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatedkernels import _extension

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))

# What PyTorch calls a processor's best set, and the sets that it then has
SETS = {"AVX512": {"avx512", "avx2", "portable"}, "AVX2": {"avx2", "portable"}}


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def cap(request: pytest.FixtureRequest) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    is_there = request.param in SETS.get(capability, {"portable"})
    if request.param == "avx512bf16":
        is_there = torch.cpu._is_avx512_bf16_supported()
    if not is_there:
        pytest.skip(f"this processor has {capability}, without {request.param}")
    return request.param


def sweep(script: str, folder: Path, *arguments: str, cap: str = "avx512") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={**os.environ, "GATEDKERNELS_ISA": cap},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_instruction_set(cap: str, tmp_path: Path):
    done = sweep("isa_sweep.py", tmp_path, cap=cap)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cap]


def test_nothing_is_read_beyond_the_inputs(cap: str, tmp_path: Path):
    done = sweep("guard_sweep.py", tmp_path, cap=cap)
    *cases, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"ended by {done.returncode} in {last}\n{done.stderr}"
    assert last == "whole"
    assert len({case.split()[0] for case in cases}) == 15  # every operator of the library that has kernels


def test_the_guard_would_notice(tmp_path: Path):
    done = sweep("guard_sweep.py", tmp_path, "overread")
    assert done.returncode != 0
    assert done.stdout.split() == ["overread"]
