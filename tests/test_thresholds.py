"""The file of measured thresholds: where it lies, what it survives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatedkernels import thresholds

TABLE = {"conv_out 3x3 float32 channels-last": {64: {256: 0.5, 1024: 0.75}}}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path / "folder"))
    return thresholds.path()


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert thresholds.path() == tmp_path / "folder" / "thresholds.json"
    monkeypatch.delenv(thresholds.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert thresholds.path() == tmp_path / "gatedkernels" / "thresholds.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):  # which the XDG specification declares invalid
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert thresholds.path() == tmp_path / "home" / ".cache" / "gatedkernels" / "thresholds.json"


def test_what_is_saved_is_loaded(file: Path):
    assert thresholds.load(2) == {}
    assert not file.exists()
    assert thresholds.save(TABLE, 2) == file
    assert thresholds.load(2) == TABLE
    assert thresholds.load(1) == {}
    assert [path.name for path in sorted(file.parent.iterdir())] == ["thresholds.json", "thresholds.lock"]


def test_another_machine_has_its_own(monkeypatch: pytest.MonkeyPatch):
    thresholds.save(TABLE, 2)
    monkeypatch.setattr(thresholds, "cpu_name", lambda: "another processor")
    assert thresholds.load(2) == {}
    thresholds.save({"other": {8: {16: 0.1}}}, 2)
    monkeypatch.undo()


def test_saving_merges():
    thresholds.save(TABLE, 2)
    thresholds.save({"other": {8: {16: 0.1}}}, 1)
    thresholds.save({next(iter(TABLE)): {64: {1024: 0.25}, 128: {16: 1.0}}}, 2)
    assert thresholds.load(2) == {next(iter(TABLE)): {64: {256: 0.5, 1024: 0.25}, 128: {16: 1.0}}}
    assert thresholds.load(1) == {"other": {8: {16: 0.1}}}


def test_processes_that_write_at_once_lose_nothing(file: Path):
    code = """
import sys
from gatedkernels import thresholds
for i in range(20):
    thresholds.save({sys.argv[1]: {8: {1 << i: i / 20}}}, 1)
    assert thresholds.load(1)[sys.argv[1]][8][1 << i] == i / 20
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, f"writer {i}"]) for i in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    rows = {1 << i: i / 20 for i in range(20)}
    assert thresholds.load(1) == {"writer 0": {8: rows}, "writer 1": {8: rows}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "1"}',
        '{"format": 1}',
        '{"format": 1, "machines": []}',
        '{"format": 1, "machines": {"m": {"2": {"thresholds": {"k": {"8": {"16": 1.5}}}}}}}',
        '{"format": 1, "machines": {"m": {"2": {"thresholds": {"k": {"8": {"16": "?"}}}}}}}',
        '{"format": 1, "machines": {"m": {"2": {}}}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_ignored_and_kept(text: str, file: Path):
    file.parent.mkdir()
    file.write_text(text, encoding="latin-1")
    with pytest.warns(RuntimeWarning, match=r"thresholds\.json must hold thresholds.* it is ignored"):
        assert thresholds.load(2) == {}
    assert file.read_text(encoding="latin-1") == text
    with pytest.warns(RuntimeWarning, match=r"it was moved to .*damaged-"):
        thresholds.save(TABLE, 2)
    assert thresholds.load(2) == TABLE
    (kept,) = file.parent.glob("*damaged*")
    assert kept.read_text(encoding="latin-1") == text


def test_a_newer_file_is_left_alone(file: Path):
    file.parent.mkdir()
    file.write_text('{"format": 2, "anything": 1}')
    with pytest.warns(RuntimeWarning, match="must have format 1, got 2"):
        assert thresholds.load(2) == {}
    with pytest.raises(ValueError, match="must have format 1, got 2: another gatedkernels wrote it"):
        thresholds.save(TABLE, 2)
    assert json.loads(file.read_text())["format"] == 2


def test_a_folder_that_cannot_be_written(file: Path):
    file.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot be written to .*folder.*set GATEDKERNELS_CACHE"):
        thresholds.save(TABLE, 2)
    with pytest.warns(RuntimeWarning, match="it is ignored"):
        assert thresholds.load(2) == {}


def test_a_write_that_fails_leaves_the_file_whole(file: Path, monkeypatch: pytest.MonkeyPatch):
    thresholds.save(TABLE, 2)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        thresholds.save({"other": {8: {16: 0.1}}}, 2)
    assert thresholds.load(2) == TABLE
    assert not list(file.parent.glob("*.tmp"))


def test_classes():
    assert [thresholds.channel_class(torch.empty(k, c, 1, 1)) for k, c in ((64, 64), (64, 128), (60, 70), (1, 1))] == [
        64, 64, 64, 1
    ]  # fmt: skip
    assert [thresholds.pixel_class(pixels) for pixels in (0, 1, 49, 196, 784, 3136, 50176)] == [
        1, 1, 64, 256, 1024, 4096, 65536
    ]  # fmt: skip
    weight = torch.empty(8, 4, 1, 1, dtype=torch.bfloat16)
    assert thresholds.kind("conv_in", weight, False) == "conv_in 1x1 bfloat16 converted"


def test_larger_images_take_the_threshold_of_the_next_smaller():
    kind = next(iter(TABLE))
    found = [thresholds.find(TABLE, kind, 64, pixels) for pixels in (64, 256, 1024, 16384)]
    assert found == [None, 0.5, 0.75, 0.75]
    assert thresholds.find(TABLE, kind, 128, 1024) is None
    assert thresholds.find(TABLE, "other", 64, 1024) is None
