"""The GPU benchmark where there is no GPU: its cases, its runner, its files."""

import json
import subprocess
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_cases, gpu_checks, gpu_slimmable
from bench.gpu_time import measure
from bench.gpu_trials import Network, Way, network_ways
from gatedkernels import tuning

CASE = gpu_cases.GpuBlock(16, 3, 2, 0.5, "independent", "float32")


def test_cases_differ_and_cover_every_shape():
    of_masks = (gpu_cases.BLOCKS, gpu_cases.SMALL_BATCHES, gpu_cases.SCHEDULED, gpu_cases.TUNED, gpu_cases.NETWORKS)
    for cases in (*of_masks, gpu_slimmable.SLICED, gpu_slimmable.SLIMMABLE):
        assert len({str(case) for case in cases}) == len(cases)
    assert {(case.channels, case.size) for case in gpu_slimmable.SLICED} == set(gpu_cases.SHAPES)
    assert {(case.channels, case.size) for case in gpu_cases.BLOCKS} == set(gpu_cases.SHAPES)
    assert gpu_cases.BLOCKS[0].multiply_adds == 2 * 9 * 64 * 64 * 32 * 32 * 256


@pytest.mark.parametrize("masks", gpu_cases.MASKS)
@pytest.mark.parametrize("kept", gpu_cases.KEPT)
def test_masks_keep_what_they_should(masks: str, kept: float):
    draw = [gpu_cases.draw_masks(masks, 32, 256, kept, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draw)
    decisions = 256 // (64 if masks == "group64" else 1)
    assert (draw[0].sum(1) == max(1, round(kept * decisions)) * 256 // decisions).all()
    if masks == "codebook8":
        assert len(draw[0].unique(dim=0)) <= 8
        assert len(draw[0].unique_consecutive(dim=0)) <= 8
    if masks == "group64":
        assert torch.equal(draw[0], draw[0][:, ::64].repeat_interleave(64, 1))


def test_speedups_are_over_the_fastest_dense_way(monkeypatch: pytest.MonkeyPatch):
    seconds = {"slow": 4.0, "fast": 2.0, "ours": 1.0}
    monkeypatch.setattr(gpu, "measure", lambda calls: [seconds[calls[0].__name__]] * 3)

    def way(name: str, dense: bool) -> Way:
        call = lambda: None  # noqa: E731 - it gets a name below
        call.__name__ = name
        return Way(name, dense, [call])

    rows = gpu.rows_of("blocks", {}, iter([way("slow", True), way("fast", True), way("ours", False)]))
    assert {row.way: row.speedup for row in rows} == {"slow": 0.5, "fast": 1.0, "ours": 2.0}


def test_a_wrong_result_and_a_failure_are_rows_without_times():
    def fail() -> None:
        raise RuntimeError("out of memory")

    right, wrong = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    ways = [Way("dense", True, [lambda: None]), Way("right", False, [lambda: right]),
            Way("wrong", False, [lambda: wrong]), Way("fails", False, [fail])]  # fmt: skip
    rows = {row.way: row for row in gpu.rows_of("blocks", {"a": 1}, iter(ways))}
    assert rows["dense"].ms and rows["right"].ms and rows["right"].speedup
    assert "must agree" in rows["wrong"].note and rows["wrong"].speedup is None
    assert rows["fails"].note == "RuntimeError: out of memory" and not rows["fails"].ms


def test_a_case_that_cannot_be_made_is_a_row():
    def ways():
        raise RuntimeError("no room")
        yield

    assert gpu.rows_of("blocks", {}, ways())[0].note == "RuntimeError: no room"


def test_parts_write_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        gpu.main(["ceilings", "cudnn", "small", "schedules", "networks", "--small", "--out", str(tmp_path / "new")])
        == 0
    )
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert {"machine", "versions", "commit", "date", "rows"} == set(content)
    rows = [gpu.Row(**row) for row in content["rows"]]
    assert {row.part for row in rows} == {"ceilings", "cudnn", "small", "schedules", "networks"}
    assert all(row.ms for row in rows if not row.way.startswith("triton"))
    assert (tmp_path / "new" / "results.md").read_text() == gpu.table(rows) + "\n"
    assert {path.name for path in (tmp_path / "new").glob("*.png")} == {
        "small-16-3-2-float32.png", "schedules-16-3-2-float32.png", "networks-16-cifar-1-0.125-float32-18.png"
    }  # fmt: skip
    assert "written to" in capsys.readouterr().out


def test_a_lost_device_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rest is measured in a new process, behind what there is."""

    def ways(case: gpu_cases.GpuBlock, place: str):
        yield Way(f"way {case}", False, [lambda: None])

    cases = [gpu_cases.GpuBlock(size, 3, 2, 0.5, "independent", "float32") for size in (16, 32, 64)]
    monkeypatch.setitem(gpu.PARTS, "blocks", gpu.Blocks("blocks", cases, ways))
    monkeypatch.setitem(gpu.PARTS, "small", gpu.Blocks("small", cases[:1], ways))
    monkeypatch.setattr(gpu, "compile_ahead", lambda parts: None)
    monkeypatch.setattr(gpu, "device", lambda: "cuda")
    monkeypatch.setattr(gpu, "about", dict)
    monkeypatch.setattr(gpu, "plots", lambda rows, out: [])
    states = iter([False, True, *[False] * 9])
    monkeypatch.setattr(gpu, "is_lost", lambda: next(states))
    started = []
    monkeypatch.setattr(gpu.subprocess, "call", lambda command, cwd: started.append(command) or 0)
    assert gpu.main(["blocks", "small", "--out", str(tmp_path)]) == 0
    assert started == [
        [gpu.sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--first", "2", "blocks", "small"]
    ]
    assert gpu.main(started[0][3:]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["part"], row["facts"]["channels"]) for row in rows] == [
        ("blocks", 16), ("blocks", 32), ("blocks", 64), ("small", 16)
    ]  # fmt: skip
    assert len(started) == 1


def test_every_part_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "is_lost", lambda: True)
    started = []
    monkeypatch.setattr(gpu.subprocess, "call", lambda command, cwd: started.append(command) or 0)
    assert gpu.main(["ceilings", "cudnn", "--small", "--out", str(tmp_path)]) == 0
    assert started[0][3:] == ["--out", str(tmp_path), "--first", "1", "--small", "ceilings", "cudnn"]
    monkeypatch.setattr(gpu, "is_lost", lambda: False)
    assert gpu.main(started[0][3:]) == 0
    whole = [row.way for part in ("ceilings", "cudnn") for rows in gpu.PARTS[part](tmp_path, True, 0) for row in rows]
    assert [row.way for row in gpu.stored(tmp_path)] == whole


def test_tuning_is_kept_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it can be measured; here, why it cannot."""
    monkeypatch.setenv("GATEDKERNELS_CACHE", "elsewhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (rows,) = gpu.run_tuning(tmp_path, small=True, first=0)
    assert [row.note for row in rows] == ["RuntimeError: tune measures on a CUDA device, and PyTorch finds none"]
    assert gpu.os.environ["GATEDKERNELS_CACHE"] == "elsewhere"
    monkeypatch.setattr(tuning, "tune", lambda model, x: [tuning.Tuned("shape", ((16,), 1, 0), 0.5, 1.0, 9, 0)])
    (rows,) = gpu.run_tuning(tmp_path, small=True, first=0)
    assert [(row.ms, row.speedup) for row in rows] == [([0.5] * 3, 2.0)]


def test_every_gated_way_is_called_once_ahead(monkeypatch: pytest.MonkeyPatch):
    """Whatever fails; and dense ways are not."""
    called = []

    def ways(case: str, place: str):
        for name, dense in (("dense", True), ("wrong", False), ("right", False)):
            yield Way(name, dense, [lambda name=name: called.append((case, name)) or 1 / (name != "wrong")] * 2)
        raise RuntimeError("no memory")

    monkeypatch.setattr(gpu, "_OF_BLOCKS", (gpu.Blocks("small", ["a", "b"], ways), gpu.Blocks("blocks", ["c"], ways)))
    monkeypatch.setattr(gpu, "get_context", lambda method: SimpleNamespace(Pool=lambda processes, *_: ThreadPool(1)))
    gpu.compile_ahead(["small", "tests"])
    assert sorted(called) == sorted((case, way) for case in "ab" for way in ("wrong", "right"))


def test_both_depths_run_dense_and_masked():
    for depth in (18, 50):
        case = gpu_cases.GpuNetwork(16, "cifar", 2, 1.0, 0.125, "float32", depth)
        network = Network(case, "cpu", torch.float32)
        x = torch.randn(2, 3, 16, 16)
        masks = network.draw(case, torch.Generator().manual_seed(0), "cpu")
        torch.testing.assert_close(network(x, masks, "masked"), network(x))


@pytest.mark.parametrize("depth", [18, 50])
def test_dense_ways_through_a_network_agree(depth: int):
    case = replace(gpu_cases.NETWORKS[0].small(), depth=depth)
    ways = {way.name: way for way in network_ways(case, "cpu")}
    assert ways.keys() == {"cudnn", "cudnn, fused", "masked", "triton"}
    assert ways["cudnn"].dense and ways["cudnn, fused"].dense
    torch.testing.assert_close(ways["cudnn, fused"].calls[0](), ways["cudnn"].calls[0]())


@pytest.mark.parametrize("width", [0.5, gpu_slimmable.MIXED])
def test_widths_are_served_by_what_there_is(width: float | str):
    """Here cuDNN's ways alone; the interpreter and a GPU have the others."""
    case = gpu_slimmable.GpuSliced(64, 8, 4, width).small()
    rows = {row.way: row for row in gpu.rows_of("sliced", case.facts(), gpu_slimmable.sliced_ways(case, "cpu"))}
    assert all(row.ms if "cudnn" in way else row.note or row.ms for way, row in rows.items())
    assert rows["triton, a width for every sample"]
    if width == 0.5:
        assert rows["cudnn, slices"].speedup


def test_slimmable_networks_agree_with_the_narrow_ones():
    case = gpu_slimmable.SLIMMABLE[0].small()
    results = [way.calls[0]() for way in gpu_slimmable.slimmable_ways(case, "cpu")]
    assert len(results) == 3
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arguments", "message"), [(["nonsense"], "PART must be one of"), ([], "needs a CUDA device")])
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "device", lambda: "cpu")
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_the_clock_counts_every_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    called = []
    assert measure([lambda: called.append(1)] * 4).median >= 0
    assert len(called) == 4


def test_it_needs_nothing_that_trains_or_draws():
    absent = ("lightning", "sklearn", "torchvision", "torchmetrics", "safetensors", "kornia", "PIL", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=gpu_checks.ROOT, check=True)
