"""What only a GPU can show of the Triton kernels: shipped tiles at full size, captured graphs, streams."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels import calibration_gpu, policy, thresholds
from gatedkernels.ops.channel_gate.reference import gate_logits
from gatedkernels.ops.plan.reference import plan_reference

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
    # Far from where the ReLUs switch, on either side: one sign that rounding decides outweighs all other errors.
    side = torch.where(torch.arange(shape[0], device="cuda") % 2 == 0, 1, -1)
    tensors[2] += 8 * side
    tensors[4] += 64 * side.roll(1)
    for density in (0.0, 0.3, 1.0):
        mask = torch.rand(6, shape[0], device="cuda") < density
        own = gradients(lambda *t: run(list(t), mask, "triton", stride), tensors)  # noqa: B023
        wide = [t.double() for t in tensors]
        exact = gradients(lambda *t: run(list(t), mask, "reference", stride), wide, rounded_to=dtype)  # noqa: B023
        tolerance = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]  # float32: with tf32
        for one, other in zip(own, exact, strict=True):
            error, norm = float((one.double() - other).norm()), float(other.norm())
            assert error <= tolerance * norm, f"error {error:.3g} of {norm:.3g}"


# Channels, size and batch for which the shipped schedules are the ordinary grid, a split reduction, and a large grid.
SCHEDULED = ((64, 8, 4), (512, 4, 1), (512, 4, 256))


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have been compiled before
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def check_replays(call: Callable[[], Any], changes: Iterable[Callable[[], object]]) -> None:
    """A captured call follows each change of its inputs, to the bit."""
    graph, results = captured(call)
    for change in changes:
        change()
        graph.replay()
        exact = call()
        for own, other in zip(*([r] if isinstance(r, Tensor) else r for r in (results, exact)), strict=True):
            assert torch.equal(own, other)


def redraw(mask: Tensor, density: float) -> Callable[[], object]:
    return lambda: mask.copy_(torch.rand(mask.shape, device="cuda") < density)


@pytest.mark.parametrize(("channels", "size", "batch"), SCHEDULED)
def test_a_graph_follows_changing_masks(channels: int, size: int, batch: int):
    tensors, mask = block(channels, size, batch, torch.bfloat16), torch.rand(batch, channels, device="cuda") < 0.5
    check_replays(lambda: run(tensors, mask, "triton"), (redraw(mask, d) for d in (0.0, 0.3, 0.9, 1.0)))


def gated(channels: int, size: int, batch: int, codebook: int | None = None) -> tuple[nn.Module, Tensor]:
    """An optimised block, and images for it."""
    own = gk.nn.GatedBasicBlock(channels, channels, codebook=codebook).cuda().eval()
    x = torch.randn(batch, channels, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    return gk.optimize(own.bfloat16(), x.bfloat16()), x.bfloat16()


@pytest.mark.parametrize("codebook", [None, 4], ids=["channels", "codebook"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_a_graph_follows_what_gates_decide(shape: tuple[int, int], codebook: int | None):
    """Gate, lists, groups and both convolutions from images that change; the decisions are returned as well."""
    fast, x = gated(*shape, 20, codebook)

    def call() -> tuple[Tensor, Tensor]:
        y, gate = fast(x, return_gate=True)
        return y, gate.mask

    first = call()[1]
    check_replays(call, [lambda: x.copy_(torch.randn_like(x)), lambda: x.zero_()])
    assert not torch.equal(first, call()[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_gates_decide_as_their_definition(shape: tuple[int, int]):
    """But for logits that rounding may put on either side."""
    channels, size = shape
    for batch in (1, 7, 300):
        x = torch.randn(batch, channels, size, size, device="cuda").bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        shapes = (channels // 4, channels), (channels // 4,), (channels, channels // 4), (channels,)
        layers = [torch.randn(each, device="cuda") for each in shapes]
        logits = gate_logits(x.double(), *(layer.double() for layer in layers))
        clear = logits.abs() > 1e-5 * logits.abs().amax()
        mask, lists = launch_gate(x, layers)
        assert torch.equal(mask[clear], (logits >= 0)[clear])
        for found, exact in zip(lists[:2], plan_reference(mask), strict=True):
            assert torch.equal(found, exact)


def launch_gate(x: Tensor, layers: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    from gatedkernels.ops.channel_gate import launch

    return launch.channel_gate(x, layers)


def test_a_graph_follows_changing_codes():
    tensors, table = block(64, 4, 20, torch.bfloat16), torch.rand(5, 64, device="cuda") < 0.4
    codes = torch.zeros(20, dtype=torch.int64, device="cuda")
    changes = [redraw(table, 0.2), *(lambda: codes.copy_(torch.randint(5, (20,), device="cuda")) for _ in range(3))]
    check_replays(lambda: gk.ops.coded_block(*tensors, table, codes, residual=tensors[0], backend="triton"), changes)


def test_a_graph_follows_the_order_of_similar_masks():
    tensors, mask = block(64, 4, 20, torch.bfloat16), torch.rand(20, 64, device="cuda") < 0.5
    call = lambda: gk.gated_block(*tensors, mask, residual=tensors[0], shared=4, backend="triton")  # noqa: E731
    check_replays(call, (redraw(mask, d) for d in (0.0, 0.1, 0.3, 1.0)))
    exact = run(tensors, mask, "triton")
    torch.testing.assert_close(call(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("operation", ["gated_block", "conv_out"])
def test_a_graph_switches_sides(operation: str):
    """Above the threshold the dense side serves, below it the gated one, in one graph."""
    from gatedkernels.ops.ragged import switch

    x, *weights = block(64, 8, 20, torch.bfloat16)
    mask, ones = torch.rand(20, 64, device="cuda") < 0.5, (1, 1)

    def call() -> Tensor:
        if operation == "conv_out":
            return switch.gated_conv2d(x, *weights[:2], mask, ones, ones, ones, 0.5)
        return switch.gated_block(x, *weights, mask, x, ones, 0.5)

    check_replays(call, (redraw(mask, d) for d in (0.1, 0.9, 0.0, 1.0, 0.3)))
    if operation == "conv_out":
        exact = gk.gated_conv2d(x, *weights[:2], None, mask, padding=1, backend="triton")
    else:
        exact = gk.gated_block(x, *weights, mask, residual=x, backend="triton")
    torch.testing.assert_close(call(), exact, rtol=2e-2, atol=2e-2)


def test_a_measured_threshold_serves_without_synchronisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calibration writes a table, "auto" reads it, and nothing is copied to the host."""
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path))
    # A few of the 144 cases that there are, each of which compiles its own kernels.
    monkeypatch.setattr(calibration_gpu, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(calibration_gpu, "IMAGES", (8,))
    policy.forget()
    try:
        table = gk.calibrate(device="cuda", channels=(64,), pixels=(1024,), seconds=1e-3)
        assert thresholds.load(thresholds.GPU_THREADS, thresholds.gpu(torch.device("cuda", 0))) == table
        tensors, mask = block(64, 8, 16, torch.bfloat16), torch.rand(16, 64, device="cuda") < 0.3
        exact = run(tensors, mask, "dense")
        for threshold in (0.0, 0.5, 1.0):
            served = {kind: {64: {1024: threshold}} for kind in table}
            monkeypatch.setattr(policy, "measured_on", lambda device: served)  # noqa: B023
            policy.forget()
            run(tensors, mask, "auto")
            torch.cuda.set_sync_debug_mode("error")
            y = run(tensors, mask, "auto")
            torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(y, exact, rtol=2e-2, atol=2e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
        policy.forget()


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
