"""Tuning: what is a candidate, who is chosen, what is kept. tests/ops/test_triton_schedules.py tunes interpreted."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gatedkernels as gk
from gatedkernels import cli, tuning
from gatedkernels.ops.ragged import configurations
from gatedkernels.ops.ragged.configurations import Configuration, Shape, Tile, configure
from gatedkernels.training.errors import RunError

SMALL = Shape("out", True, "bfloat16", 9, 1, 1, 512, 512, 16, 4)
LARGE = Shape("in", False, "bfloat16", 9, 1, 1, 128, 128, 1024, 256)
CHIPS = {"ampere": (8, 0), "ada": (8, 9), "hopper": (9, 0)}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_its_tiles(chip: str):
    assert configurations.family(CHIPS[chip]) == chip
    limit = configurations.shared_memory(CHIPS[chip])
    for size in (2, 4):
        for listed in (True, False):
            assert all(tile.shared(size, CHIPS[chip]) <= limit for tile in configurations.shipped(size, listed, chip))


def test_an_unknown_chip_is_taken_for_one_of_little_memory():
    assert configurations.family((7, 5)) == configurations.family((12, 0)) == "ada"
    assert configurations.family((10, 0)) == "hopper"


@pytest.mark.parametrize("capability", CHIPS.values())
@pytest.mark.parametrize("groups", [1, 16, 256, 4096])
def test_no_list_of_tiles_is_shipped_that_costs_a_launch(groups: int, capability: tuple[int, int]):
    for shape in (SMALL, LARGE):
        for packed in (True, False):
            assert configure(shape._replace(groups=groups, packed=packed), capability).programs == 0


def test_small_maps_are_split_and_large_batches_scheduled():
    assert configure(SMALL, (9, 0)).splits == 8
    assert configure(SMALL._replace(groups=16), (9, 0)).splits == 2
    assert configure(SMALL._replace(groups=64), (9, 0)) == Configuration(configure(SMALL, (9, 0)).tile)
    many = SMALL._replace(groups=256)
    assert [configure(many, capability, tiles_free=True).programs for capability in CHIPS.values()] == [3, 3, 4]
    assert configure(many._replace(pixels=784), (8, 0), tiles_free=True).programs == 2
    assert configure(LARGE, (9, 0), tiles_free=True)[1:] == (1, 0)
    assert configure(SMALL._replace(in_channels=8, taps=1), (9, 0)).splits == 1  # nothing to split


@pytest.mark.parametrize("capability", CHIPS.values())
@pytest.mark.parametrize("shape", [SMALL, LARGE, SMALL._replace(pixels=1, in_channels=3, numbers="tf32", taps=1)])
def test_candidates_fit_and_differ(shape: Shape, capability: tuple[int, int]):
    chosen = configure(shape, capability)
    for others in configurations.ROUNDS:
        found = others(chosen, shape, capability)
        assert found and chosen not in found and len(set(found)) == len(found)
        assert all(configurations.fits(shape, each.tile, capability) for each in found)
        assert len(found) <= 20
    tiles = configurations.tiles(chosen, shape, capability)
    assert all(min(each.tile[:3]) >= 16 and each.tile.rows <= max(16, 2 * shape.pixels) for each in tiles)
    assert configurations.schedules(chosen, shape._replace(listed="none"), capability) == [
        each for each in configurations.schedules(chosen, shape, capability) if not each.programs
    ]


def test_keys_tell_shapes_apart():
    assert SMALL.key() == "bfloat16 out packed, 9 taps / 1 x 1, 512 > 512, 16 pixels x 4"
    assert SMALL._replace(groups=3).key() == SMALL.key()
    for field, value in {
        "listed": "in",
        "packed": False,
        "numbers": "tf32",
        "taps": 1,
        "stride": 4,
        "spread": 4,
    }.items():
        assert SMALL._replace(**{field: value}).key() != SMALL.key()
    for field in ("in_channels", "out_channels", "pixels", "groups"):
        assert SMALL._replace(**{field: 300}).key() != SMALL.key()


def test_no_device_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="tune measures on a CUDA device, and PyTorch finds none"):
        gk.tune(torch.nn.Identity(), torch.ones(1))
    with pytest.raises(ValueError, match="example must hold a tensor, got str"):
        gk.tune(torch.nn.Identity(), ("a",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="example must be on a CUDA device, got cpu"):
        gk.tune(torch.nn.Identity(), torch.ones(1))
    assert CliRunner().invoke(cli.app, ["tune", str(tmp_path), "--batch-size", "0"]).exit_code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["tune", str(tmp_path)])
    assert isinstance(result.exception, RunError)
    assert "tune measures on a CUDA device" in str(result.exception)


class Chips:
    """Measurements as they would be: each configuration takes so many seconds."""

    def __init__(self, seconds: dict[Configuration, float], fails: tuple[int, ...] = ()) -> None:
        self.seconds, self.fails = seconds, fails
        self.ran: list[Configuration] = []

    def run(self, configuration: Configuration) -> None:
        self.ran.append(configuration)
        if configuration.tile.stages in self.fails:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(1 << 20, 1 << 10, "shared memory")

    def timer(self, call: tuning.Call) -> float:
        call()
        return self.seconds.get(self.ran[-1], 1.0)


def test_rounds_build_on_each_other():
    pytest.importorskip("triton")
    shipped = configure(SMALL, (9, 0))
    tile = shipped._replace(tile=Tile(16, 32, 32, 4, shipped.tile.stages))
    stages = tile._replace(tile=tile.tile._replace(stages=3))
    split = Configuration(stages.tile, 4)
    chips = Chips({shipped: 1.0, tile: 0.8, stages: 0.7, split: 0.5}, fails=(2,))
    found = tuning._fastest(SMALL, chips.run, (9, 0), chips.timer)
    assert found.configuration == split
    assert (found.milliseconds, found.shipped) == (500.0, 1000.0)
    assert found.measured == len(chips.ran) == len(set(chips.ran))
    assert found.failed == sum(each.tile.stages == 2 for each in chips.ran) > 0
    assert "500.0000 ms instead of 1000.0000 by 16x32x32, 4 warps, 3 stages, 4 splits" in str(found)


def test_noise_replaces_nothing():
    pytest.importorskip("triton")
    chips = Chips({configure(SMALL, (9, 0)): 1.02})
    assert tuning._fastest(SMALL, chips.run, (9, 0), chips.timer).configuration == configure(SMALL, (9, 0))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from gatedkernels.ops.ragged import launch, measured

    monkeypatch.setenv("GATEDKERNELS_CACHE", str(tmp_path))
    launch.forget()
    yield measured
    launch.forget()


FOUND = Configuration(Tile(32, 64, 32, 4, 5), 4, 0)
CPU = torch.device("cpu")


def test_what_was_measured_serves(measured, monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.ops.ragged import launch

    shipped = configure(SMALL, measured.NO_CAPABILITY)
    assert launch.choose(SMALL, CPU) == shipped
    assert measured.save(CPU, {SMALL.key(): FOUND}).name == "tiles.json"
    assert launch.choose(SMALL, CPU) == shipped  # no surprise in the middle of a run
    launch.forget()
    assert launch.choose(SMALL, CPU) == FOUND
    assert launch.choose(LARGE, CPU) == configure(LARGE, measured.NO_CAPABILITY)
    measured.save(CPU, {LARGE.key(): FOUND})
    launch.forget()
    assert launch.choose(SMALL, CPU) == launch.choose(LARGE, CPU) == FOUND
    monkeypatch.setattr(measured, "machine", lambda device: "another GPU")
    launch.forget()
    assert launch.choose(SMALL, CPU) == shipped


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 48),
        ("depth", 8),
        ("warps", 3),
        ("stages", 0),
        ("splits", 3),
        ("programs", -1),
        ("programs", 2),
        ("more", 1),
        ("rows", "?"),
    ],
)
def test_what_kernels_cannot_have_is_not_believed(measured, field: str, value: object):
    from gatedkernels.ops.ragged import launch

    file = measured.save(CPU, {SMALL.key(): FOUND})
    content = json.loads(file.read_text())
    content["machines"][measured.machine(CPU)]["tiles"][SMALL.key()][field] = value
    file.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match=r"tiles\.json must hold tiles.*the shipped tiles serve"):
        assert launch.choose(SMALL, CPU) == configure(SMALL, measured.NO_CAPABILITY)
    with pytest.warns(RuntimeWarning, match="it was moved to"):
        measured.save(CPU, {LARGE.key(): FOUND})
    launch.forget()
    assert launch.choose(LARGE, CPU) == FOUND


def test_a_model_without_our_convolutions_is_refused(measured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning.policy, "triton_problem", lambda x: None)
    with pytest.raises(ValueError, match="model must run convolutions on the backend 'triton' to be tuned"):
        gk.tune(torch.nn.Identity(), torch.ones(1, 3, 4, 4), timer=lambda call: 1.0)
    assert not measured.TILES.path().exists()
