"""What runs the tests on a device, with other tests in their place."""

from pathlib import Path

import pytest

from bench import gpu_checks


@pytest.fixture
def own_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tests in the place of the kernels', one of which fails and the other warns."""
    file = tmp_path / "test_own.py"
    file.write_text(
        "import os, warnings\n"
        "def test_any_geometry():\n    warnings.warn('another version')\n"
        "def test_wrong():\n    assert 'PYTORCH_NO_CUDA_MEMORY_CACHING' in os.environ\n"
    )
    monkeypatch.setattr(gpu_checks, "TESTS", (str(file),))
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def test_the_devices_tests_are_run_and_counted(own_tests: Path):
    assert gpu_checks.tests(own_tests).startswith("1 failed, 1 passed")
    assert "assert 'PYTORCH_NO_CUDA_MEMORY_CACHING' in" in (own_tests / "tests.log").read_text()


def test_what_kept_tests_from_running_is_said(own_tests: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_checks.sys, "executable", "/bin/false")
    assert gpu_checks.tests(own_tests) == "exit status 1: no output"


def test_the_sanitizer_sees_some_of_them(own_tests: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(own_tests))
    assert gpu_checks.sanitizer(own_tests) == "compute-sanitizer is not on the PATH"
    program = own_tests / "compute-sanitizer"
    # Behind its own four words stands the command.
    program.write_text('#!/bin/sh\nshift 4\n"$@"\necho "========= ERROR SUMMARY: 0 errors"\n')
    program.chmod(0o755)
    note = gpu_checks.sanitizer(own_tests)
    assert note.startswith("1 passed, 1 deselected")
    assert note.endswith("========= ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(gpu_checks, "_SANITIZER_SECONDS", 0.01)
    assert gpu_checks.sanitizer(own_tests) == "stopped after 0.01 s"
