"""Every instruction set that this processor has computes the same; GATEDKERNELS_ISA caps the choice."""

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


@pytest.mark.parametrize("cap", ["avx512bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set(cap: str, tmp_path: Path):
    capability = torch.backends.cpu.get_cpu_capability()
    is_there = cap in SETS.get(capability, {"portable"})
    if cap == "avx512bf16":
        is_there = torch.cpu._is_avx512_bf16_supported()
    if not is_there:
        pytest.skip(f"this processor has {capability}, without {cap}")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("isa_sweep.py")],
        env={**os.environ, "GATEDKERNELS_ISA": cap},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cap]
