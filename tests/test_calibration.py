"""Calibration measures, stores what it measured, and the policy uses it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gatedkernels as gk
from gatedkernels import _extension, calibration, calibration_gpu, cli, policy, thresholds
from gatedkernels.reporting import doctor

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path))
    policy.forget()
    yield tmp_path
    monkeypatch.undo()
    policy.forget()


@pytest.mark.parametrize(
    ("seconds", "dense", "density"),
    [
        ((1.0, 2.0, 3.0, 4.0), 10.0, 1.0),
        ((1.0, 2.0, 3.0, 4.0), 2.0 / 0.98, 0.5),
        ((1.0, 2.0, 3.0, 4.0), 1e-9, 0.0),
        ((1.0, 1.0, 1.0, 1.0), 2.0, 1.0),
        ((1.0, 1.0, 1.0, 1.0), 0.5, 0.0),
    ],
)
def test_crossing(seconds: tuple[float, ...], dense: float, density: float):
    assert calibration.crossing((0.25, 0.5, 0.75, 1.0), seconds, dense) == density


def test_cases_leave_out_what_takes_long():
    sizes = {(case.channels, case.pixels) for case in calibration.cases() if case.side == 3}
    assert (64, 16384) in sizes
    assert (512, 1024) in sizes
    assert (512, 16384) not in sizes


@needs_cpu
def test_calibrate(folder: Path):
    lines: list[str] = []
    table = gk.calibrate(channels=(8,), pixels=(16, 64), threads=1, seconds=1e-3, progress=lines.append)
    layouts = [1 if kernel in calibration.LINEAR else 2 for kernel, _ in calibration.KERNELS]
    assert len(lines) == 2 * sum(layouts)
    assert table.keys() == {line.partition(",")[0] for line in lines}
    assert all(0 <= density <= 1 for rows in table.values() for row in rows.values() for density in row.values())
    assert thresholds.load(1) == table
    x, weight = torch.empty(1, 8, 8, 8), torch.empty(8, 8, 3, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        choice = policy.choose("conv_out", x, weight, (1, 1), (1, 1), (1, 1), 1)
    finally:
        torch.set_num_threads(before)
    assert choice == ("cpu", table["conv_out 3x3 float32 converted"][8][64])


@needs_cpu
def test_measured_linear_layers_serve_where_they_were_measured():
    """With several samples, each with a mask; few tokens, all masks at once and single samples go as shipped."""
    masks = torch.ones(32, 8, dtype=torch.bool)
    x, weight = torch.empty(32, 20, 8), torch.empty(8, 8)
    shipped = [policy.choose_linear(own, weight, None, masks[: len(own)]) for own in (x, x[:1])]
    thresholds.save({"linear_out float32": {8: {16: 0.25}}}, torch.get_num_threads())
    policy.forget()
    assert policy.choose_linear(x, weight, None, masks) == ("cpu", 0.25) != shipped[0]
    assert policy.choose_linear(x, weight, masks, None) != ("cpu", 0.25)
    assert policy.choose_linear(x[:, :3], weight, None, masks) != ("cpu", 0.25)
    assert policy.choose_linear(x[:1], weight, None, masks[:1]) == shipped[1]
    assert policy.choose_linear(x, weight, masks, masks).threshold != 0.25


@needs_cpu
def test_what_is_measured_stays_after_an_interruption():
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gk.calibrate(channels=(8,), pixels=(16,), threads=1, seconds=1e-3, progress=stop)
    assert thresholds.load(1).keys() == {"conv_out 3x3 float32 channels-last"}


def test_errors(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"channels\[0\] must be positive, got 0"):
        gk.calibrate(channels=(0,))
    with pytest.raises(ValueError, match=r"pixels must hold at least one int, got none"):
        gk.calibrate(pixels=())
    with pytest.raises(ValueError, match=r"seconds must be positive, got 0\.0"):
        gk.calibrate(seconds=0.0)
    monkeypatch.setattr(_extension, "CPU_ERROR", "it was not built")
    with pytest.raises(RuntimeError, match="no CPU kernels to calibrate: it was not built"):
        gk.calibrate()


@needs_cpu
def test_nothing_is_measured_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "file").touch()
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(folder / "file"))
    monkeypatch.setattr(calibration, "_measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(OSError, match="set GATEDKERNELS_CACHE"):
        gk.calibrate()


@needs_cpu
def test_command_and_doctor(folder: Path):
    section = next(name for name in doctor.examine() if "measured here" in name)
    assert "gatedkernels calibrate" in doctor.examine()[section]["state"]
    options = ["--channels", "8", "--pixels", "16", "--seconds", "0.001"]
    result = CliRunner().invoke(cli.app, ["calibrate", *options])
    assert result.exit_code == 0, result.output
    assert str(folder / "thresholds.json") in result.output.replace("\n", "")
    facts = doctor.examine()[section]
    assert facts["file"] == str(folder / "thresholds.json")
    assert facts["conv_in 1x1 float32 converted"].startswith("8 channels: ")
    (folder / "thresholds.json").write_text("{")
    assert "it is ignored" in doctor.examine()[section]["problem"]
    result = CliRunner().invoke(cli.app, ["calibrate", "--seconds", "-1"])
    assert result.exit_code == 1
    assert "seconds must be positive" in result.output


def times(dense: float, gated: list[float], switched: list[float], other: float | None) -> dict[str, list[float]]:
    """What a timer of the GPU's calls says, a time for each density."""
    found = {"dense": [dense], **{f"gated {d}": [t] for d, t in zip((0.25, 0.5, 0.75, 1.0), gated, strict=True)}}
    if other is not None:
        found |= {f"switched {d}": [t] for d, t in zip((0.25, 0.5, 0.75), switched, strict=True)}
        found["other side"] = [other]
    return found


@pytest.mark.parametrize(
    ("gated", "switched", "other", "threshold"),
    [
        ([1, 2, 3, 4], [1.5, 2.5, 3.5], 99.0, 1.0),  # faster at any density: nobody looks
        ([2, 4, 6, 8], [2, 4, 6], 5.1, 0.61),  # 0.98 of the dense time
        ([2, 4, 6, 8], [2, 4, 6], 5.2, 0.0),  # the dense side costs more than PyTorch's dense way may
        ([2, 4, 6, 8], [6, 7, 8], 5.0, 0.0),
        ([2, 4, 6, 8], [], None, 0.0),  # there is no other side
    ],
)
def test_thresholds_of_a_gpu(gated: list[float], switched: list[float], other: float | None, threshold: float):
    case = calibration_gpu.Case("gated_block", 3, 16, 2, 4, torch.float32)

    def timer(calls: dict, seconds: float) -> dict[str, list[float]]:
        assert calls.keys() >= times(5, gated, switched, other).keys()
        return times(5, gated, switched, other)

    assert calibration_gpu.measure(case, 0.1, torch.device("cpu"), timer) == threshold


def test_what_cannot_switch_has_one_side():
    for kernel, channels, sides in (("gated_block", 16, 9), ("gated_block", 20, 5), ("conv_in", 16, 5)):
        case = calibration_gpu.Case(kernel, 3, channels, 1, 4, torch.float32)
        assert len(calibration_gpu.calls(case, torch.device("cpu"))) == sides


def test_calibrate_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="there is no CUDA device to calibrate, got device cuda"):
            gk.calibrate(device="cuda")
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got meta"):
        gk.calibrate(device="meta")
    monkeypatch.setattr(calibration, "_check_device", lambda device: None)
    monkeypatch.setattr(thresholds, "gpu", lambda device: "a GPU")
    drawn = iter([0.5, 0.4] * 99)
    monkeypatch.setattr(calibration_gpu, "measure", lambda *_: next(drawn))
    lines: list[str] = []
    table = gk.calibrate(device="cuda", channels=(64,), pixels=(256,), progress=lines.append)
    assert len(lines) == len(calibration_gpu.cases((64,), (256,))) == 12 * 3 * 3  # images of 4, 8 and 16 pixels a side
    assert thresholds.load(thresholds.GPU_THREADS, "a GPU") == table
    assert thresholds.load(thresholds.GPU_THREADS) == {}
    assert "gated_block 3x3 bfloat16, images of 16 pixels" in table
    assert all(row == {256: pytest.approx(0.45, abs=0.06)} for rows in table.values() for row in rows.values())
