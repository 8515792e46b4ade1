"""Run folders: locked, whole, and clear about what is wrong with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatedkernels.training.config import TrainConfig
from gatedkernels.training.errors import RunError
from gatedkernels.training.run_folder import RunFolder, write_atomically

_HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_config_and_weights_round_trip(tmp_path: Path):
    folder, config = RunFolder(tmp_path), TrainConfig(epochs=20)
    folder.write_config(config)
    folder.write_weights({"a": torch.arange(3.0)}, epochs=2, steps=7)
    assert folder.read_config() == config
    assert torch.equal(folder.read_weights()["a"], torch.arange(3.0))
    assert folder.read_progress() == {"epochs": 2, "steps": 7}


def test_a_folder_in_use_is_refused(tmp_path: Path):
    command = [sys.executable, "-c", _HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match="another process is training"), RunFolder(tmp_path).locked():
            pass
        other.kill()
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses to be written, /proc")
def test_unwritable_folder():
    with pytest.raises(RunError, match="run_dir must be a folder that can be written, got /proc/run"):
        RunFolder(Path("/proc/run")).locked().__enter__()


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be a folder that can be written"):
        RunFolder(tmp_path / "file").locked().__enter__()


def test_missing_files(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match=r"config\.json is missing"):
        folder.read_config()
    with pytest.raises(RunError, match=r"must have finished an epoch, .*backbone\.safetensors is missing"):
        folder.read_weights()
    with pytest.raises(RunError, match=r"last\.ckpt is missing"):
        folder.check_checkpoint()


def test_damaged_files(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for file in (folder.config_file, folder.weights_file, folder.checkpoint_file):
        file.write_bytes(b"nonsense")
    with pytest.raises(RunError, match=r"config\.json must be a run's configuration"):
        folder.read_config()
    for read in (folder.read_weights, folder.read_progress):
        with pytest.raises(RunError, match=r"backbone\.safetensors must be a complete safetensors file"):
            read()
    with pytest.raises(RunError, match=r"last\.ckpt must be a complete checkpoint"):
        folder.check_checkpoint()


def test_strangers_pickles_are_not_executed(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = RunFolder(tmp_path)
    torch.save({"state_dict": Bomb()}, folder.checkpoint_file)
    with pytest.raises(RunError, match="must be a complete checkpoint"):
        folder.check_checkpoint()
    assert not (tmp_path / "executed").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
