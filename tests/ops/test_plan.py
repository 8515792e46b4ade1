"""The operation ``plan``, and the packed layout that its reference defines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gatedkernels as gk
from gatedkernels.ops.plan.reference import active, mask_of, pack, plan_reference, unpack

SHAPES = [(1, 1), (3, 5), (2, 64), (5, 130), (0, 8), (4, 0), (0, 0)]


def by_definition(mask: Tensor) -> tuple[list[list[int]], list[int]]:
    rows = mask.tolist()
    index = [[c for c, on in enumerate(row) if on] + [c for c, on in enumerate(row) if not on] for row in rows]
    return index, [sum(row) for row in rows]


def assert_is_plan(plan: tuple[Tensor, Tensor], mask: Tensor) -> None:
    index, count = plan
    assert index.dtype == count.dtype == torch.int32
    assert index.shape == mask.shape
    assert count.shape == mask.shape[:1]
    assert (index.tolist(), count.tolist()) == by_definition(mask)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plan", [plan_reference, gk.plan], ids=["reference", "kernel"])
def test_definition(plan, shape: tuple[int, int], density: float):
    mask = torch.rand(shape) < density
    assert_is_plan(plan(mask), mask)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_kernel_reads_any_strides(layout: str):
    mask = torch.rand(6, 21) < 0.5
    mask = {"transposed": mask.t().contiguous().t(), "sliced": mask[::2, 1::3], "expanded": mask[:1].expand(7, -1)}[
        layout
    ]
    assert not mask.is_contiguous()
    assert_is_plan(gk.plan(mask), mask)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 6), st.integers(0, 70), st.integers(0, 2**32))
def test_kernel_equals_the_reference(n: int, c: int, seed: int):
    mask = torch.rand(n, c, generator=torch.Generator().manual_seed(seed)) < 0.5
    for ours, defined in zip(gk.plan(mask), plan_reference(mask), strict=True):
        assert torch.equal(ours, defined)


def test_packing_is_inverted_by_unpacking(images):
    mask = torch.rand(3, 7) < 0.5
    x = images((3, 7, 4, 2))
    index, count = gk.plan(mask)
    packed = pack(x, index, count)
    for n in range(3):
        assert torch.equal(packed[n, : count[n]], x[n, mask[n]])
        assert not packed[n, count[n] :].any()
    assert torch.equal(mask_of(index, count), mask)
    assert torch.equal(active(index, count).sum(1), count)
    poisoned = torch.where(active(index, count)[..., None, None], packed, torch.nan)
    assert torch.equal(unpack(poisoned, index, count), torch.where(mask[..., None, None], x, 0))


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (2, 0)], ids=str)
def test_registration(shape: tuple[int, int]):
    torch.library.opcheck(torch.ops.gatedkernels.plan.default, (torch.rand(shape) < 0.5,))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(gk.plan, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(3, 5), (4, 9)]:
        mask = torch.rand(shape) < 0.5
        assert_is_plan(compiled(mask), mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, r"mask must be a tensor of dtype torch\.bool, got torch\.float32"),
        (torch.ones(2, 3, dtype=torch.uint8), TypeError, r"got torch\.uint8"),
        ([[True]], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask must have shape \(N, C\), got \(3,\)"),
        (torch.ones(2, 3, 1, dtype=torch.bool), ValueError, r"got \(2, 3, 1\)"),
    ],
)
def test_errors(mask: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        gk.plan(mask)  # type: ignore[arg-type]
