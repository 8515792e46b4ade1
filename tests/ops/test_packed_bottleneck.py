"""The operator of a whole bottleneck against its definition."""

import pytest
import torch
from torch import Tensor

from gatedkernels import _extension
from gatedkernels.ops.packed import DEFINITIONS, pack_blocks

ops = torch.ops.gatedkernels
define = DEFINITIONS["packed_bottleneck"]

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))

# Planes, image and stride: odd ones, and such as let weights be gathered, for part of the samples
SIZES = [(12, 7, 5, 2), (33, 3, 9, 1), (64, 8, 8, 1), (70, 13, 11, 2), (100, 17, 17, 1), (8, 1, 1, 1)]
DENSITIES = [0.0, 0.1, 0.4, 0.9, 1.0]


def make_parts(planes: int, channels: int, stride: int, decisions: int | None = None) -> list[Tensor | None]:
    """The tensors of a bottleneck, its gates, and its shortcut where it needs one."""
    out = 4 * planes
    parts: list[Tensor | None] = []
    for inputs in (channels, planes):
        many = decisions or planes
        parts += [torch.randn(6, inputs), torch.randn(6), torch.randn(many, 6), torch.randn(many)]
    for k, c, side in ((planes, channels, 1), (planes, planes, 3), (out, planes, 1)):
        weight = torch.randn(k, c, side, side) / (c * side * side) ** 0.5
        parts += [weight if side == 1 and k == planes else pack_blocks(weight), torch.randn(k)]
    if stride == 1 and channels == out:
        return [*parts, None, None]
    return [*parts, pack_blocks(torch.randn(out, channels, 1, 1) / channels**0.5), torch.randn(out)]


def no_gates(parts: list[Tensor | None]) -> list[Tensor | None]:
    return [None] * 8 + parts[8:]


def wide(parts: list[Tensor | None]) -> list[Tensor | None]:
    return [None if part is None else part.double() for part in parts]


def images(n: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_with_given_masks(size: tuple[int, ...], density: float, assert_within_budget):
    planes, height, width, stride = size
    for channels in (4 * planes, 10):
        x, parts = images(3, channels, height, width), no_gates(make_parts(planes, channels, stride))
        masks = torch.rand(3, planes) < density, torch.rand(3, planes) < density / 2 + 0.3
        y, *decided = ops.packed_bottleneck(x, parts, *masks, stride)
        exact = define(x.double(), wide(parts), *masks, stride)[0]
        assert_within_budget(y, exact, define(x, parts, *masks, stride)[0])
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert all(mask.all() and mask.shape == (3, planes) for mask in decided)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("decisions", [None, 8])
def test_both_gates_decide(n: int, decisions: int | None, assert_within_budget):
    x, parts = images(n, 20, 9, 8), make_parts(40, 20, 2, decisions)
    y, *decided = ops.packed_bottleneck(x, parts, None, None, 2)
    exact, *right = define(x.double(), wide(parts), None, None, 2)
    assert_within_budget(y, exact, define(x, parts, None, None, 2)[0])
    for mask, want in zip(decided, right, strict=True):
        assert torch.equal(mask, want)
        assert mask.shape == (n, decisions or 40)


def test_a_given_mask_leaves_the_decision_to_the_other_gate():
    x, parts = images(2, 20, 6, 6), make_parts(40, 20, 1)
    given = torch.rand(2, 40) < 0.5
    for masks in ((given, None), (None, given)):
        y, *decided = ops.packed_bottleneck(x, parts, *masks, 1)
        exact, *right = define(x.double(), wide(parts), *masks, 1)
        assert (y - exact).norm() <= 1e-5 * exact.norm()
        assert all(torch.equal(mask, want) for mask, want in zip(decided, right, strict=True))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_over_its_images(density: float):
    x, parts = images(5, 160, 9, 9), make_parts(40, 160, 1)
    masks = torch.rand(5, 40) < density, torch.rand(5, 40) < density
    y, *decided = ops.packed_bottleneck(x, parts, *masks, 1)
    assert torch.equal(torch.stack(ops.packed_bottleneck_(x, parts, *masks)), torch.stack(decided))
    assert torch.equal(x, y)


def test_images_of_any_layout_and_none():
    parts = make_parts(16, 20, 2)
    x = images(3, 20, 7, 6)
    y = ops.packed_bottleneck(x, parts, None, None, 2)[0]
    assert torch.equal(ops.packed_bottleneck(x.contiguous(), parts, None, None, 2)[0], y)
    assert ops.packed_bottleneck(x[:0], parts, None, None, 2)[0].shape == (0, 64, 4, 3)


def test_closed_channels_are_not_read():
    x, parts = images(2, 160, 6, 6), no_gates(make_parts(40, 160, 1))
    masks = torch.rand(2, 40) < 0.3, torch.rand(2, 40) < 0.3
    y = ops.packed_bottleneck(x, parts, *masks, 1)[0]
    weight1 = parts[8]
    assert weight1 is not None
    weight1[~masks[0].any(0)] = torch.nan
    assert torch.equal(ops.packed_bottleneck(x, parts, *masks, 1)[0], y)


# Planes, channels, size and stride; the shortcut of the last but one has so many weights that all samples share them,
# the last one has none.
@pytest.mark.parametrize("size", [(70, 100, 15, 2), (130, 520, 5, 2), (40, 160, 9, 1)], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("n", [1, 5, 17])
def test_any_number_of_threads(threads: int, n: int, size: tuple[int, ...]):
    planes, channels, side, stride = size
    x, parts = images(n, channels, side, side), make_parts(planes, channels, stride)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.packed_bottleneck(x, parts, None, None, stride)
        torch.set_num_threads(threads)
        for got, want in zip(ops.packed_bottleneck(x, parts, None, None, stride), alone, strict=True):
            assert torch.equal(got, want)
        if parts[-1] is None:
            ops.packed_bottleneck_(x, parts, None, None)
            assert torch.equal(x, alone[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 5])
def test_a_shortcut_of_many_weights(n: int, assert_within_budget):
    x, parts = images(n, 520, 5, 4), no_gates(make_parts(130, 520, 2))
    masks = torch.rand(n, 130) < 0.4, torch.rand(n, 130) < 0.4
    exact = define(x.double(), wide(parts), *masks, 2)[0]
    assert_within_budget(ops.packed_bottleneck(x, parts, *masks, 2)[0], exact, define(x, parts, *masks, 2)[0])


@pytest.mark.parametrize(
    ("at", "wrong", "match"),
    [
        (0, torch.randn(6, 21), "weights are"),
        (4, torch.randn(6, 20), "weights are"),
        (4, torch.randn(40, 6).T, "layer of the gate"),
        (1, None, "two layers"),
        (10, torch.randn(2, 40, 3, 1, 32), "weight2"),
        (12, torch.randn(5, 40, 1, 1, 16), "weight3"),
        (14, torch.randn(5, 20, 3, 3, 32), "shortcut"),
        (15, torch.randn(159), "shortcut"),
        (8, None, "three convolutions"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(at: int, wrong: Tensor | None, match: str):
    x, parts = images(5, 20, 6, 6), make_parts(40, 20, 2)
    ops.packed_bottleneck(x, parts, None, None, 2)
    parts[at] = wrong
    with pytest.raises(RuntimeError, match=match):
        ops.packed_bottleneck(x, parts, None, None, 2)


def test_only_images_that_can_hold_the_result_are_written_over():
    with pytest.raises(RuntimeError, match="layout"):
        ops.packed_bottleneck_(images(2, 20, 6, 6), make_parts(40, 20, 1), None, None)
    with pytest.raises(RuntimeError, match="layout"):
        ops.packed_bottleneck_(images(2, 160, 6, 6).contiguous(), make_parts(40, 160, 1), None, None)


def test_schemas():
    x, parts = images(2, 160, 6, 6), make_parts(40, 160, 1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.packed_bottleneck.default, (x, parts, None, None, 1), test_utils=checks)
    torch.library.opcheck(ops.packed_bottleneck_.default, (x, parts, None, None), test_utils=checks)
