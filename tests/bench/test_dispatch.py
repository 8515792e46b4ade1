"""What a call costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import dispatch
from gatedkernels import _extension

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def test_calls_have_nothing_to_compute():
    for name, call in dispatch.calls().items():
        result = call()
        first = result[0] if isinstance(result, tuple) else result
        assert isinstance(first, torch.Tensor), name
        assert first.numel() == 0, name


def test_it_prints_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "microseconds", lambda call: 2.5)
    monkeypatch.setattr(sys, "argv", ["dispatch"])
    threads = torch.get_num_threads()
    try:
        dispatch.main()
    finally:
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(dispatch.calls())
    assert rows[0] == "| plan_cpu | 2.5 | 2.5 |"


def test_as_a_command():
    command = [sys.executable, "-m", "bench.dispatch", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "--threads" in done.stdout
