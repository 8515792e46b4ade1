"""``gatedkernels report`` on a run folder."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gatedkernels.reporting import command
from gatedkernels.training import run as runs
from gatedkernels.training.errors import RunError


@pytest.fixture
def run_folder(build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose run is a small network and three images."""
    model, _ = build("resnet18")
    images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(3)]
    data = SimpleNamespace(test=images, mean=(0.5,) * 3, std=(0.25,) * 3)
    monkeypatch.setattr(runs, "load_run", lambda path: (SimpleNamespace(image_size=16, width=0.25), model))
    monkeypatch.setattr(runs, "load_run_data", lambda config: data)
    monkeypatch.setattr("gatedkernels.training.augment.plain_view", lambda *options: lambda image: image / 255)
    rows = command.latency_rows
    layers = command.report_layers
    monkeypatch.setattr(command, "latency_rows", lambda *a, **o: rows(*a, **o, compiled=False, seconds=0.02))
    monkeypatch.setattr(command, "report_layers", lambda *a, **o: layers(*a, **{**o, "seconds": 0.02}))
    return tmp_path


def test_prints_and_writes(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    command.report(run_folder, batch_sizes=(1, 2))
    said = capsys.readouterr().out
    assert "layer4.1" in said and "times as fast" in said
    assert "Not tried: compiled (not asked for)." in " ".join(said.split())
    assert "The whole network again, now against every dense way" in said
    written = json.loads((run_folder / "latency-cpu.json").read_text())
    assert [row["batch"] for row in written["latency"]] == [1, 2]
    assert len(written["layers"]) == 2
    assert "| layer4.1 |" in (run_folder / "latency-cpu.md").read_text()
    assert (run_folder / "latency-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bad_requests(run_folder: Path):
    with pytest.raises(RunError, match="batch sizes must not exceed the 3 test images, got 4"):
        command.report(run_folder, batch_sizes=(1, 4))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="device must be available, got 'cuda'"):
            command.report(run_folder, device="cuda")


def test_no_run(tmp_path: Path):
    with pytest.raises(RunError, match="run must be the folder of a training run"):
        command.report(tmp_path)
