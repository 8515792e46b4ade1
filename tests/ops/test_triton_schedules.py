"""Ways through the ragged convolution's tiles: on a GPU, or interpreted on the CPU (test_triton.py starts that)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels.ops.ragged.reference import Work, schedule_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("exact_float32"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def choose() -> Iterator[Callable[[str], None]]:
    """Let all launches go through their tiles in one way."""
    from gatedkernels.ops.ragged import launch
    from gatedkernels.ops.ragged.configurations import Configuration, Tile

    tile = Tile(16, 32, 16, 4, 2)
    ways = {
        "ordinary": Configuration(tile),
        "scheduled": Configuration(tile, programs=1),
        "split": Configuration(tile, splits=2),
        "split into many": Configuration(tile, splits=8),
    }
    yield lambda way: launch.set_chooser(lambda shape, run: ways[way])
    launch.set_chooser(None)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def draw(samples: int, channels: int, density: float) -> Tensor:
    return torch.rand(samples, channels, device=DEVICE) < density


def numbers(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("ins", "outs"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_list_is_the_emulated_one(ins: bool, outs: bool, ordered: bool):
    from gatedkernels.ops.ragged.configurations import Configuration, Shape, Tile
    from gatedkernels.ops.ragged.groups import equal_groups
    from gatedkernels.ops.ragged.launch import AS_THEY_ARE, List, schedule

    chosen = Configuration(Tile(16, 32, 16, 4, 2), programs=2)
    for samples, shared, pixels, channels, codes in ((5, 2, 9, 70, 3), (3, 1, 20, 33, 1), (40, 3, 5, 100, 4)):
        found = torch.randint(codes, (samples,), device=DEVICE)
        groups = equal_groups(found, codes, shared) if ordered else AS_THEY_ARE
        places = len(groups.order) if ordered else samples
        number = -(-places // shared)
        count = codes if ordered else number
        lists = [torch.randint(channels + 1, (count,), dtype=torch.int32, device=DEVICE) for _ in range(2)]
        in_count, out_count = lists[0] if ins else None, lists[1] if outs else None
        shape = Shape("both", outs, "float32", 9, 1, 1, channels, channels, shared * pixels, number)
        device = torch.device(DEVICE)
        tiles = schedule(shape, chosen, samples, shared, List(None, in_count), List(None, out_count), groups, device)
        work = Work(
            samples, shared, pixels, channels, 16, 32, numbers(in_count), numbers(out_count),
            numbers(groups.order), numbers(groups.lists), outs,
        )  # fmt: skip
        expected = schedule_reference(work)
        assert int(tiles[0]) == len(expected)
        assert tiles[1 : 1 + len(expected)].tolist() == expected


@pytest.mark.parametrize("way", ["scheduled", "split"])
@pytest.mark.parametrize(("ins", "outs"), [(0.5, None), (0.4, 0.5), (None, 0.0)])
def test_convolutions_and_their_gradients(
    gradients: Callable, choose: Callable, ins: float | None, outs: float | None, way: str
):
    n, c, k = 2, 20, 37
    in_mask, out_mask = (None if d is None else draw(n, m, d) for d, m in ((ins, c), (outs, k)))
    tensors = [randn(n, c, 5, 4), randn(k, c, 3, 3), randn(k)]

    def run(backend: str) -> list[Tensor | None]:
        return gradients(lambda *t: gk.gated_conv2d(*t, in_mask, out_mask, padding=1, backend=backend), tensors)

    choose(way)
    for own, exact in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ins", "outs"), [(0.5, None), (0.4, 0.5)])
def test_another_order_of_tiles_gives_the_same_bits(choose: Callable, ins: float, outs: float | None):
    in_mask, out_mask = draw(2, 20, ins), None if outs is None else draw(2, 37, outs)
    tensors, runs = (randn(2, 20, 5, 4), randn(37, 20, 3, 3), None, in_mask, out_mask), []
    for way in ("ordinary", "scheduled"):
        choose(way)
        runs.append(gk.gated_conv2d(*tensors, padding=1, backend="triton"))
    assert torch.equal(*runs)


@pytest.mark.parametrize(("way", "shared"), [("scheduled", 1), ("scheduled", 2), ("split", 2), ("split into many", 1)])
def test_blocks(choose: Callable, way: str, shared: int):
    from gatedkernels.ops.ragged.gated import coded_block, gated_block

    choose(way)
    n, c, m, k = 5, 12, 37, 18
    tensors = randn(n, c, 2, 3), randn(m, c, 3, 3), randn(m), randn(k, m, 3, 3), randn(k)
    residual, table = randn(n, k, 2, 3), draw(3, m, 0.4)
    codes = torch.tensor([2, 0, 2, 2, 0], device=DEVICE)
    exact = gk.gated_block(*tensors, table[codes], residual=residual, backend="reference")
    runs = [gated_block(*tensors, table[codes], residual, (1, 1), shared, similar) for similar in (False, True)]
    runs.append(coded_block(*tensors, table, codes, residual, (1, 1), shared))
    for y in runs:
        torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_split_sums_have_one_order(choose: Callable):
    choose("split")
    x, weight, mask = randn(2, 40, 4, 4), randn(36, 40, 3, 3), draw(2, 36, 0.5)
    runs = [gk.gated_conv2d(x, weight, None, None, mask, padding=1, backend="triton") for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("packed", [True, False])
def test_who_comes_last_leaves_the_counters_as_they_were(packed: bool):
    """They come with the list, or, of more tiles than these serve, from the convolution itself."""
    from gatedkernels.ops.ragged import launch
    from gatedkernels.ops.ragged.configurations import ARRIVED, Configuration, Tile

    x, weight = randn(3, 20, 4, 4).contiguous(memory_format=torch.channels_last), randn(40, 20, 3, 3)
    for counters in (ARRIVED, 4, None):
        lists = launch.plan(draw(3, 40, 0.4))
        assert torch.equal(lists.arrived, torch.zeros(ARRIVED, dtype=torch.int32, device=DEVICE))
        lists = lists._replace(arrived=None if counters is None else lists.arrived[:counters].clone())
        found = []
        for splits in (1, 4, 4):
            y = launch.packed_like(x, 40, 4, 4).zero_()
            launch.convolve(
                x, weight, None, y, outs=lists, padding=(1, 1), packed_out=packed,
                configuration=Configuration(Tile(16, 32, 16, 4, 2), splits),
            )  # fmt: skip
            found.append(y)
            assert counters is None or not lists.arrived.any()
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], found[2])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("way", ["scheduled", "split"])
def test_infinity_stays_where_it_is(choose: Callable, way: str):
    choose(way)
    x = randn(1, 5, 4, 6)
    x[0, 0, 0, 0] = torch.inf
    weights, mask = (randn(20, 5, 3, 3), None, randn(9, 20, 3, 3), None), draw(1, 20, 0.3)
    y = gk.gated_block(x, *weights, mask, backend="triton")
    # On the CPU: what cuDNN transforms, an infinity leaves beyond the window.
    own = [None if each is None else each.cpu() for each in (x, *weights, mask)]
    exact = gk.gated_block(*own, backend="reference").to(y.device)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert y[..., 4:].isfinite().all()


def test_shipped_configurations_are_used(monkeypatch: pytest.MonkeyPatch):
    """A small image splits the reduction; a large batch of wide layers has a list of tiles where that comes along."""
    from gatedkernels.ops.ragged import launch

    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *tensors, **constants: launched.append((grid, constants["SPLITS"]))

    monkeypatch.setattr(launch.kernels, "ragged_conv_kernel", Recorder())
    monkeypatch.setattr(launch.schedule_kernels, "schedule_kernel", None)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 100)
    launch.forget()

    def convolve(samples: int, listed: bool, complete: Callable | None = None) -> None:
        x = torch.empty(samples, 4, 4, 512, device=DEVICE, dtype=torch.float16).permute(0, 3, 1, 2)
        weight = torch.empty(512, 512, 3, 3, device=DEVICE, dtype=torch.float16)
        counts = torch.full((samples,), 100, dtype=torch.int32, device=DEVICE) if listed else None
        y = launch.packed_like(x, 512, 4, 4)
        outs = launch.List(None, counts)
        launch.convolve(x, weight, None, y, outs=outs, padding=(1, 1), packed_out=listed, complete=complete)

    convolve(1, True)
    convolve(256, True)
    convolve(256, False)
    assert launched == [((8, 8), 8), ((2048, 1), 1), ((2048, 1), 1)]
    launched.clear()
    completed = []
    convolve(256, True, lambda shape, chosen: completed.append(chosen.programs))
    assert launched == [((100 * completed[0],), 1)]
    assert completed[0] in (2, 3, 4)  # as many as a chip has room for


class Block(torch.nn.Module):
    """Two gated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([randn(20, 5, 3, 3), randn(5, 20, 3, 3)])
        self.mask = draw(1, 20, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return gk.gated_block(x, self.weights[0], None, self.weights[1], None, self.mask, backend="triton")


@pytest.mark.parametrize("finished", [True, False])
def test_tuning(finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The fastest by an injected timer is stored, and used from then on; also what was measured before it stopped."""
    from gatedkernels.ops.ragged import launch, measured

    monkeypatch.setenv("GATEDKERNELS_CACHE", str(tmp_path))
    launch.forget()
    lines: list[str] = []
    times = [1.0]

    def timer(call: Callable[[], None]) -> float:
        if lines and not finished:
            raise KeyboardInterrupt
        times.append(0.9 * times[-1])  # the last of all is the fastest
        return times[-1]

    model, x = Block(), randn(1, 5, 3, 4)
    exact = model(x)
    if finished:
        found = gk.tune(model, x, timer=timer, progress=lines.append)
        assert [str(each) for each in found] == lines
        assert len({each.key for each in found}) == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            gk.tune(model, x, timer=timer, progress=lines.append)
    stored = measured.measured(measured.machine(x.device))
    assert len(stored) == len(lines) == 1 + finished
    assert all(each.programs == 4 and each.tile.stages == 6 for each in stored.values())
    y = model(x)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    launch.forget()
