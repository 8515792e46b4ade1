"""Plans for groups of similar samples: on a GPU, or interpreted on the CPU (test_triton.py starts that)."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels.ops.ragged.groups_reference import similar_groups_reference, union_reference
from gatedkernels.ops.ragged.reference import Work, schedule_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("exact_float32"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
PIXELS = 9  # of a sample, where a convolution is at hand


def draw(samples: int, channels: int, density: float) -> Tensor:
    return torch.rand(samples, channels, device=DEVICE) < density


def strided(mask: Tensor) -> Tensor:
    """The same decisions, not dense along either axis, among others that are all open."""
    wide = mask.new_ones((2 * mask.shape[0], 3 * mask.shape[1]))
    wide[::2, ::3] = mask
    return wide[::2, ::3]


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, c: draw(n, c, 0.4),
    "closed": lambda n, c: draw(n, c, -1.0),
    "open": lambda n, c: draw(n, c, 2.0),
    "equal": lambda n, c: draw(1, c, 0.5).expand(n, c),
    "of groups": lambda n, c: draw(n, -(-c // 8), 0.4).repeat_interleave(8, 1)[:, :c],
    "of three": lambda n, c: draw(3, c, 0.5)[torch.arange(n, device=DEVICE) % 3],
    "strided": lambda n, c: strided(draw(n, c, 0.3)),
    "transposed": lambda n, c: draw(c, n, 0.3).T,
}


def check(mask: Tensor, shared: int, scheduled: bool) -> None:
    """Both launches against the reference: order, unions, and the list of tiles against the emulated one."""
    from gatedkernels.ops.ragged.configurations import Configuration, Shape, Tile
    from gatedkernels.ops.ragged.groups import similar

    (n, c), groups = mask.shape, -(-len(mask) // shared)
    planned = similar(mask, shared)
    shape = Shape("out", True, "float32", 9, 1, 1, c, c, shared * PIXELS, groups)
    tiles = planned.complete(shape, Configuration(Tile(16, 32, 16, 4, 2), programs=int(scheduled)))
    order = similar_groups_reference(mask, shared)
    index, count = union_reference(mask, order, shared)
    assert torch.equal(planned.groups.order, order)
    assert torch.equal(planned.lists.counts, count)
    assert torch.equal(planned.lists.indices, index)
    if not scheduled:
        assert tiles is None
        return
    work = Work(n, shared, PIXELS, c, 16, 32, None, count.tolist(), order.tolist(), None, True)
    expected = schedule_reference(work)
    assert int(tiles[0]) == len(expected)
    assert tiles[1 : 1 + len(expected)].tolist() == expected


@pytest.mark.parametrize("kind", MASKS)
def test_both_launches_equal_the_reference(kind: str):
    check(MASKS[kind](7, 33), 3, kind != "transposed")


@pytest.mark.parametrize(
    ("samples", "channels", "shared"),
    [
        *((1, 1, 1), (2, 50, 2), (3, 51, 2), (9, 65, 8), (256, 1, 3)),
        # Minutes of the interpreter.
        *(
            pytest.param(*size, marks=pytest.mark.slow if INTERPRETED else [])
            for size in ((256, 512, 8), (1, 2048, 8), (255, 300, 5), (1024, 64, 4), (37, 70, 4))
        ),
    ],
)
def test_sizes(samples: int, channels: int, shared: int):
    table = draw(4, channels, 0.4)
    mask = table[torch.randint(4, (samples,), device=DEVICE)] ^ draw(samples, channels, 0.1)
    check(mask, shared, channels % 2 == 0)


def test_every_run_gives_the_same():
    from gatedkernels.ops.ragged.groups import similar

    mask = draw(40, 100, 0.5)
    assert torch.equal(*(similar(mask, 4).groups.order for _ in range(2)))


def test_equal_masks_come_together():
    from gatedkernels.ops.ragged.groups import similar

    table, codes = draw(4, 70, 0.4), torch.arange(32, device=DEVICE) % 4
    order = similar(table[codes], 8).groups.order
    assert sorted(order.tolist()) == list(range(32))
    assert all(len(set(codes[group.long()].tolist())) == 1 for group in order.view(-1, 8))
    assert similar(table[:3], 2).groups.order.tolist()[-1] == 3  # an empty place


def test_one_channel_of_a_decision_tells_all():
    """Four decisions of 64 channels each: groups of the fifteen masks that there can be, but where two of them meet."""
    from gatedkernels.ops.ragged.groups import similar

    mask = draw(64, 4, 0.5).repeat_interleave(64, 1)
    order = similar(mask, 4).groups.order.long()
    met = sum(len(mask[group].unique(dim=0)) > 1 for group in order.view(-1, 4))
    assert met <= len(mask.unique(dim=0)) - 1


@pytest.mark.parametrize(("samples", "channels"), [(0, 4), (4, 0), (1025, 2), (2, 2049)])
def test_what_one_program_has_no_room_for_is_left_to_others(samples: int, channels: int):
    from gatedkernels.ops.ragged.groups import similar

    assert similar(draw(samples, channels, 0.5), 2) is None


def test_a_block_of_more_samples_than_one_program_orders(monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.ops.ragged import similar_kernels

    monkeypatch.setattr(similar_kernels, "MOST_SAMPLES", 4)
    n, c = 6, 10
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((n, c, 2, 3), (c, c, 3, 3), (c,), (c, c, 3, 3), (c,))]
    mask = draw(n, c, 0.4)
    y, exact = (gk.gated_block(*tensors, mask, shared=4, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(y, exact, rtol=1e-2, atol=1e-2)


def test_the_plan_is_two_launches(monkeypatch: pytest.MonkeyPatch):
    """A block of similar samples: order, unions with the list of tiles, and its two convolutions."""
    from gatedkernels.ops.ragged import groups, launch
    from gatedkernels.ops.ragged.configurations import Configuration, Tile
    from gatedkernels.ops.ragged.gated import gated_block

    launched: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *tensors, **constants: launched.append(self.name)

    kernels = {
        groups.similar_kernels: ("order_kernel", "union_kernel"), launch.kernels: ("ragged_conv_kernel",),
        launch.schedule_kernels: ("schedule_kernel",), launch.plan_kernels: ("plan_kernel",),
    }  # fmt: skip
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(name))
    launch.set_chooser(lambda shape, run: Configuration(Tile(16, 32, 16, 4, 2), programs=int(shape.packed)))
    try:
        x, weight, bias = (torch.empty(shape, device=DEVICE) for shape in ((6, 16, 4, 4), (16, 16, 3, 3), (16,)))
        gated_block(x, weight, bias, weight, None, draw(6, 16, 0.5), None, (1, 1), 2, similar=True)
    finally:
        launch.set_chooser(None)
    assert launched == ["order_kernel", "union_kernel", "ragged_conv_kernel", "ragged_conv_kernel"]
