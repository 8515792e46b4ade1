"""The machine's facts and ceilings, and the doctor who reads them out."""

from pathlib import Path

import pytest
import torch

from gatedkernels import _extension
from gatedkernels.reporting import command, doctor, machine


def test_facts():
    assert machine.cpu_name()
    found = machine.versions()
    assert found.keys() == {"python", "gatedkernels", "torch", "numpy"}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine.versions("no-such-package")["no-such-package"] == "missing"


def test_last_level_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_level_cache() is None
    for index, size in enumerate(("48K", "1024K", "32M", "", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache() == 32 << 20


@pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))
def test_instruction_set():
    assert machine.instruction_set() in ("avx512bf16", "avx512", "avx2", "portable")


def test_no_library_no_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "CPU_ERROR", "it was not built")
    assert machine.instruction_set() is None
    facts = doctor.examine()["compiled kernels"]
    assert facts["cpu"] == "missing: it was not built"
    assert facts["instruction set"].startswith("none")


def test_ceilings_are_measured_once_and_plausible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_PROBE_SECONDS", 0.01)
    place = torch.device("cpu")
    peak = machine.peak_macs(place, torch.float32, 1)
    assert 1e8 < peak < 1e14
    assert machine.peak_macs(place, torch.float32, 1) == peak
    speed = machine.bandwidth(place, 3e6, 1)
    assert 1e8 < speed < 1e14
    assert machine.bandwidth(place, 3.1e6, 1) == speed


def test_doctor_names_what_matters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    command.doctor()
    said = capsys.readouterr().out
    for word in ("torch", "numpy", "instruction set", "gpus", "cuda", "conv_in", "more", "threads"):
        assert word in said


def test_the_doctor_shows_tuned_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from gatedkernels.ops.ragged import measured
    from gatedkernels.ops.ragged.configurations import Configuration, Tile

    def facts() -> dict[str, str]:
        return next(section for name, section in doctor.examine().items() if name.startswith("tiles"))

    def save(name: str, found: dict[str, Configuration]) -> None:
        monkeypatch.setattr(measured, "machine", lambda device: name)
        measured.save(torch.device("cpu"), found)

    monkeypatch.setenv("GATEDKERNELS_CACHE", str(tmp_path))
    assert facts() == {"file": str(tmp_path / "tiles.json"), "state": "none: gatedkernels tune"}
    assert doctor.tiles_in_effect() == {}
    save("another GPU", {"a shape": Configuration(Tile(16, 32, 16, 4, 2))})
    save(
        "this GPU",
        {"one": Configuration(Tile(64, 32, 16, 4, 3), splits=2), "two": Configuration(Tile(16, 32, 16, 4, 2))},
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor.policy, "measured_on", lambda device: {})
    measured.measured.cache_clear()
    assert facts() == {
        "file": str(tmp_path / "tiles.json"),
        "another GPU": "1 shapes, which serve there alone",
        "one": "64x32x16, 4 warps, 3 stages, 2 splits",
        "two": "16x32x16, 4 warps, 2 stages",
    }
    assert doctor.tiles_in_effect().keys() == {"one", "two"}
    (tmp_path / "tiles.json").write_text("{")
    assert "it is ignored" in facts()["problem"]
    measured.measured.cache_clear()
