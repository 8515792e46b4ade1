"""The kernels with one thread, many, and none to spare: right, and the same bits every time."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.ops.packed import pack_blocks, pack_rows, pack_tile_blocks, pack_tile_rows

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))

Call = Callable[[], Tensor]
NAMES = ["conv_out", "conv_in", "gated_conv2d", "gated_block", "packed_block", "packed_block, bfloat16"]


@pytest.fixture(autouse=True)
def given_threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_calls() -> dict[str, tuple[Call, Tensor]]:
    """One call of every kernel that divides its work among threads, and what it must return."""
    n, c, m = 6, 48, 80
    x, mask1, mask2 = torch.randn(n, c, 12, 9), torch.rand(n, c) < 0.5, torch.rand(n, m) < 0.4
    w1, b1, w2, b2 = torch.randn(m, c, 3, 3) / 20, torch.randn(m), torch.randn(c, m, 3, 3) / 27, torch.randn(c)
    plan, rows, blocks = gk.plan(mask2), pack_rows(w1), pack_blocks(w2)
    hidden = gk.conv_out(x, w1, b1, *plan, padding=1, relu=True, backend="reference")
    big = torch.randn(24, 300, 4, 4), torch.randn(64, 300, 3, 3) / 50, torch.randn(300, 64, 3, 3) / 25
    some = torch.rand(24, 64) < 0.4
    tokens, w3, w4 = torch.randn(n, 30, c), torch.randn(m, c), torch.randn(c, m)
    units = tokens @ w3.T
    calls: dict[str, Callable[..., Tensor]] = {
        "conv_out": lambda b="cpu": gk.conv_out(x, w1, b1, *plan, padding=1, backend=b),
        "conv_in": lambda b="cpu": gk.conv_in(hidden, w2, b2, *plan, padding=1, backend=b),
        "gated_conv2d": lambda b="cpu": gk.gated_conv2d(x, w1, b1, mask1, mask2, padding=1, backend=b),
        "gated_block": lambda b="cpu": gk.gated_block(x, w1, b1, w2, b2, mask2, residual=x, backend=b),
        "gated_block, sliced": lambda b="cpu": gk.gated_block(
            big[0], big[1], None, big[2], None, some, residual=big[0], backend=b
        ),
        "gated_linear, out": lambda b="cpu": gk.gated_linear(tokens, w3, b1, None, mask2, backend=b),
        "gated_linear, in": lambda b="cpu": gk.gated_linear(units, w4, b2, mask2, backend=b),
        "gated_linear, few tokens": lambda b="cpu": gk.gated_linear(tokens[:, 0], w3, b1, None, mask2, backend=b),
    }
    with_references: dict[str, tuple[Call, Tensor]] = {
        name: (call, call("reference"))
        for name, call in calls.items()  # type: ignore[call-arg]
    }
    tiles = pack_tile_rows(w1), pack_tile_blocks(w2)
    for name, own in (("packed_block", (None, None)), ("packed_block, on tiles", tiles)):
        with_references[name] = (
            lambda own=own: torch.ops.gatedkernels.packed_block(x, rows, b1, blocks, b2, *own, mask2, x, 1),
            with_references["gated_block"][1],
        )
    narrow = [t.bfloat16() for t in (x, rows, b1, blocks, b2)]
    narrow_tiles = pack_tile_rows(w1.bfloat16()), pack_tile_blocks(w2.bfloat16())
    for name, own in (("packed_block, bfloat16", (None, None)), ("packed_block, bfloat16, on tiles", narrow_tiles)):
        with_references[name] = (
            lambda own=own: torch.ops.gatedkernels.packed_block(*narrow, *own, mask2, narrow[0], 1),
            with_references["gated_block"][1].bfloat16(),
        )
    for name, gradient in make_gradients(x, (w1, b1, w2, b2), (mask1, mask2), big, some).items():
        with_references[name] = gradient
    return with_references


def make_gradients(
    x: Tensor,
    block: tuple[Tensor, ...],
    masks: tuple[Tensor, Tensor],
    big: tuple[Tensor, ...],
    some: Tensor,
) -> dict[str, tuple[Call, Tensor]]:
    """One backward of every kind, all gradients in a row."""
    w1, b1, w2, b2 = block
    large = torch.randn(3, 384, 5, 5), torch.randn(384, 384, 3, 3) / 60, torch.randn(384, 384, 3, 3) / 60
    calls: dict[str, Callable[..., Tensor]] = {
        "backward of gated_conv2d, out": lambda b="cpu": gradients(
            lambda *t: gk.gated_conv2d(*t, out_mask=masks[1], padding=1, stride=2, backend=b), x, w1, b1
        ),
        "backward of gated_conv2d, in": lambda b="cpu": gradients(
            lambda *t: gk.gated_conv2d(*t, in_mask=masks[0], padding=1, backend=b), x, w1, b1
        ),
        "backward of gated_block": lambda b="cpu": gradients(
            lambda *t: gk.gated_block(*t, masks[1], residual=x, backend=b), x, w1, b1, w2, b2
        ),
        "backward of gated_block, many samples": lambda b="cpu": gradients(
            lambda *t: gk.gated_block(t[0], t[1], None, t[2], None, some, backend=b), *big
        ),
        "backward of gated_block, large filters": lambda b="cpu": gradients(
            lambda *t: gk.gated_block(t[0], t[1], None, t[2], None, torch.ones(3, 384) > 0, backend=b), *large
        ),
    }
    return {name: (call, call("reference")) for name, call in calls.items()}


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).sin()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(y, leaves, dy)])


def assert_right(y: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if y.dtype == torch.float32 else 0.05
    if y.ndim == 1:  # gradients jump where an activation is zero but for rounding
        assert (y - expected).norm() <= 1e-3 * expected.norm()
    else:
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int):
    """Eight are more than many machines have: a thread that waits must let the others run."""
    calls = make_calls()
    torch.set_num_threads(threads)
    for name, (call, expected) in calls.items():
        first = call()
        assert_right(first, expected)
        for _ in range(5):
            assert torch.equal(call(), first), name


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_two_python_threads_at_once(threads: int):
    calls = make_calls()
    torch.set_num_threads(threads)

    def run(names: list[str]) -> list[Tensor]:
        torch.set_num_threads(threads)  # OpenMP keeps the number for every thread of Python
        return [calls[name][0]() for name in names * 4]

    names = list(calls)
    alone = dict(zip(names, run(names), strict=False))
    with ThreadPoolExecutor(2) as pool:
        for order, results in zip((names, names[::-1]), pool.map(run, (names, names[::-1])), strict=True):
            for name, y in zip(order * 4, results, strict=True):
                assert torch.equal(y, alone[name]), name
                assert_right(y, calls[name][1])


def openmp_runtime() -> ctypes.CDLL:
    """The OpenMP runtime that PyTorch's own thread pool uses."""
    maps = Path("/proc/self/maps").read_text().split() if sys.platform == "linux" else []
    paths = [path for path in maps if "libgomp" in path]
    if not paths:
        pytest.skip("PyTorch does not use GNU's OpenMP here")
    return ctypes.CDLL(paths[0])


@pytest.mark.parametrize("name", NAMES)
def test_nested_in_a_parallel_region(name: str):
    """There a region has one thread, whatever it asks for."""
    call, expected = make_calls()[name]
    torch.set_num_threads(4)
    runtime, results = openmp_runtime(), dict[int, tuple[bool, Tensor]]()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: int) -> None:
        results[runtime.omp_get_thread_num()] = bool(runtime.omp_in_parallel()), call()

    runtime.GOMP_parallel(body, None, 3, 0)
    assert len(results) == 3
    for nested, y in results.values():
        assert nested
        assert_right(y, expected)


def test_a_gate_decides_alike_alone_and_in_a_batch():
    """Threads share the weights of a single image's gate, and samples of a batch share them too: the same sums."""
    c, m = 330, 121
    x = torch.randn(7, c, 5, 4)
    gate = [torch.randn(m, c) / 18, torch.randn(m), torch.randn(c + 3, m) / 11, torch.randn(c + 3)]
    torch.set_num_threads(1)
    expected = torch.ops.gatedkernels.channel_gate(x, *gate)
    assert 0.3 < expected.float().mean() < 0.7
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.gatedkernels.channel_gate(x, *gate), expected)
        alone = [torch.ops.gatedkernels.channel_gate(image[None], *gate) for image in x]
        assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("active", [4, 6, 8, 10])
def test_large_images_take_the_same_kernels_whatever_the_threads(active: int):
    """Where tiles begin to pay depends on how many samples there are and on their size, not on the threads."""
    x = torch.randn(3, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3) / 24
    packed = pack_rows(weight), torch.zeros(64), pack_blocks(weight), torch.zeros(64)
    mask = torch.arange(64).expand(3, 64) % 64 < active
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        tiles = pack_tile_rows(weight), pack_tile_blocks(weight)
        results.append(torch.ops.gatedkernels.packed_block(x, *packed, *tiles, mask, x, 1))
    assert all(torch.equal(result, results[0]) for result in results)
