"""The tests of the kernels on a device, and their accesses to memory under CUDA's compute-sanitizer."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = max(1, (os.cpu_count() or 1) - 2)  # that compile kernels at the same time
TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        *("triton_kernels", "triton_operators", "triton_schedules", "triton_cuda"),
        *("gate_kernels", "switch_kernels", "sliced_kernels", "similar_kernels", "cuda"),
    )
)
# Of these, launches of every kind that are small and soon compiled.
_SANITIZED = "stable_sort or (within_budget and float32 and contiguous) or any_geometry or all_open_and_all_closed"
_SANITIZER_SECONDS = 300  # it slows kernels down by any factor: what there was time for is worth having
_TEST_SECONDS = "240"  # one that hangs is not to take the time of all
_ENDED = re.compile(r" in \d+\.\d+s")  # pytest's last line


def tests(out: Path) -> str:
    """Run them, in several processes where pytest-xdist is; the log is ``tests.log``, and its last line the result."""
    words = list(TESTS)
    if importlib.util.find_spec("xdist"):  # a thousand kernels are to be compiled
        words += ["-n", str(PROCESSES)]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["--timeout", _TEST_SECONDS]
    return _pytest(words, out / "tests.log")


def sanitizer(out: Path) -> str:
    """Run some of them under compute-sanitizer, if it is here; the log is ``sanitizer.log``.

    PyTorch's allocator hands out parts of large pieces of memory, within which no access is an error: it is left out.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "compute-sanitizer is not on the PATH"
    under = [program, "--tool", "memcheck", "--error-exitcode", "1"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = out / "sanitizer.log"
    ended = _pytest(["-k", _SANITIZED, *TESTS], log, under, environment, _SANITIZER_SECONDS)
    return "; ".join([ended, *(line for line in log.read_text().splitlines() if "ERROR SUMMARY" in line)])


def _pytest(
    words: Sequence[str],
    log: Path,
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Run tests, and return the last line of what they say. Other versions' warnings are no errors here."""
    command = [*under, sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *words]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too, which would keep the device
            process.wait()
            if not isinstance(stop, subprocess.TimeoutExpired):
                raise
            return f"stopped after {timeout} s"
    lines = log.read_text().splitlines()
    ended = f"exit status {process.returncode}: {lines[-1] if lines else 'no output'}"
    return next((line for line in reversed(lines) if _ENDED.search(line)), ended)
