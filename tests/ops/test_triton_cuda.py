"""What only a GPU can show of the Triton kernels: shipped tiles at full size, captured graphs, streams."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gatedkernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7))


def block(channels: int, size: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    c, scale = channels, (9 * channels) ** -0.5
    shapes = ((batch, c, size, size), (c, c, 3, 3), (c,), (c, c, 3, 3), (c,))
    x, w1, b1, w2, b2 = (torch.randn(shape, device="cuda") for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    return [t.to(dtype) for t in (x, w1 * scale, b1, w2 * scale, b2)]


def run(tensors: list[Tensor], mask: Tensor, backend: str, stride: int = 1) -> Tensor:
    residual = tensors[0] if stride == 1 else None
    return gk.gated_block(*tensors, mask, residual=residual, stride=stride, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_their_gradients(gradients: Callable, shape: tuple[int, int], stride: int, dtype: torch.dtype):
    tensors = block(*shape, 6, dtype)
    for density in (0.0, 0.3, 1.0):
        mask = torch.rand(6, shape[0], device="cuda") < density
        own = gradients(lambda *t: run(list(t), mask, "triton", stride), tensors)  # noqa: B023
        wide = [t.double() for t in tensors]
        exact = gradients(lambda *t: run(list(t), mask, "reference", stride), wide, rounded_to=dtype)  # noqa: B023
        tolerance = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]  # float32: with tf32
        for one, other in zip(own, exact, strict=True):
            error, norm = float((one.double() - other).norm()), float(other.norm())
            assert error <= tolerance * norm, f"error {error:.3g} of {norm:.3g}"


# Channels, size and batch for which the shipped schedules are the ordinary grid, a split reduction, a list of tiles.
SCHEDULED = ((64, 8, 4), (512, 4, 1), (512, 4, 256))


@pytest.mark.parametrize(("channels", "size", "batch"), SCHEDULED)
def test_a_graph_follows_changing_masks(channels: int, size: int, batch: int):
    tensors, mask = block(channels, size, batch, torch.bfloat16), torch.rand(batch, channels, device="cuda") < 0.5
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have been compiled before
        run(tensors, mask, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(tensors, mask, "triton")
    for density in (0.0, 0.3, 0.9, 1.0):
        mask.copy_(torch.rand_like(mask, dtype=torch.float32) < density)
        graph.replay()
        torch.testing.assert_close(y, run(tensors, mask, "triton"), rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "size", "batch"), SCHEDULED)
def test_no_host_synchronisation(channels: int, size: int, batch: int):
    tensors, mask = block(channels, size, batch, torch.bfloat16), torch.rand(batch, channels, device="cuda") < 0.5
    leaves = [t.requires_grad_() for t in tensors]
    run(leaves, mask, "triton").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, mask, "triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream():
    tensors, mask = block(64, 8, 4, torch.bfloat16), torch.rand(4, 64, device="cuda") < 0.5
    exact = run(tensors, mask, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the input is filled late; a kernel on another stream would not wait for it
        late = torch.zeros_like(tensors[0]).copy_(tensors[0])
        y = run([late, *tensors[1:]], mask, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, exact)


def test_a_compiled_call_is_the_same():
    tensors, mask = block(64, 8, 4, torch.bfloat16), torch.rand(4, 64, device="cuda") < 0.5
    compiled = torch.compile(lambda m, *t: run(list(t), m, "triton"), fullgraph=True)
    assert torch.equal(compiled(mask, *tensors), run(tensors, mask, "triton"))


def test_tuned_tiles_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.ops.ragged import launch, measured

    monkeypatch.setenv("GATEDKERNELS_CACHE", str(tmp_path))
    launch.forget()
    tensors, mask = block(64, 8, 4, torch.bfloat16), torch.rand(4, 64, device="cuda") < 0.5
    exact = run(tensors, mask, "triton")
    model = torch.nn.Module()
    model.forward = lambda x: run([x, *tensors[1:]], mask, "triton")
    found = gk.tune(model, tensors[0])
    assert len(found) == 2 and all(0 < each.milliseconds <= each.shipped for each in found)
    assert measured.measured(measured.machine(mask.device)) == {each.key: each.configuration for each in found}
    y = run(tensors, mask, "triton")
    assert (y - exact).norm() <= 1e-2 * exact.norm()
    monkeypatch.undo()
    launch.forget()
