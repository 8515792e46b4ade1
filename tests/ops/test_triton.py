"""The backend "triton" without a GPU: its kernels interpreted, its refusals, its compilation for absent chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gatedkernels as gk
from gatedkernels import policy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED_FILES = [
    f"test_{name}.py"
    for name in (
        *("triton_kernels", "triton_operators", "triton_schedules"),
        *("gate_kernels", "switch_kernels", "sliced_kernels", "similar_kernels"),
    )
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="they run in this process")
@pytest.mark.parametrize(
    ("file", "marker"),
    [
        *((file, "not slow") for file in INTERPRETED_FILES),
        pytest.param("test_similar_kernels.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_interpreted(file: str, marker: str):
    """Triton reads TRITON_INTERPRET when it is imported: a process of its own."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 does not run on NumPy 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, HERE / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves tensors on the CPU")
def test_tensors_on_the_cpu_are_refused():
    x, weight, mask = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 3, 3), torch.ones(1, 4, dtype=torch.bool)
    plan = gk.plan(mask)
    for call in (
        lambda: gk.gated_conv2d(x, weight, None, mask, padding=1, backend="triton"),
        lambda: gk.gated_block(x, weight, None, weight, None, mask, backend="triton"),
        lambda: gk.gated_linear(x[:, :, 0, 0], weight[:, :, 0, 0], None, mask, backend="triton"),
        lambda: gk.sliced_conv2d(x, weight, None, 2, padding=1, backend="triton"),
        lambda: gk.sliced_linear(x[:, :, 0, 0], weight[:, :, 0, 0], None, 2, backend="triton"),
        lambda: gk.conv_out(x, weight, None, *plan, padding=1, backend="triton"),
        lambda: gk.conv_in(x, weight, None, *plan, padding=1, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"backend 'triton' (needs tensors on a CUDA device|is not available)"):
            call()


def test_what_it_cannot_serve_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: object())
    assert policy.triton_problem(torch.empty(1)) is None
    assert "got x of torch.float64" in str(policy.triton_problem(torch.empty(1, dtype=torch.float64)))
    assert "interpreter" in str(policy.triton_problem(torch.empty(1, dtype=torch.bfloat16)))
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(policy.triton_problem(torch.empty(1)))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_convolution_compiles_for_an_absent_chip(arch: int):
    """One of the cases of ``make aot``, in a process without PyTorch; the judge of that is tested in tests/bench."""
    pytest.importorskip("triton")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['aot', '--jobs', '1', '--arch', sys.argv[1], '--only',"
        "'conv out 3x3/1 bf16 128x64x64']; import runpy; runpy.run_path('bench/aot.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(arch)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch] in done.stdout
