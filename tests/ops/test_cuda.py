"""The CUDA library on a GPU; without one, ``test_cuda_host.py`` runs the kernels' code on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gatedkernels import _extension
from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_extension.CUDA_ERROR is not None, reason=str(_extension.CUDA_ERROR)),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# N, C, K, H, W, R, S, stride, padding, dilation, groups
SHAPES = [
    (2, 64, 64, 8, 8, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    (1, 512, 64, 4, 4, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    (3, 70, 130, 7, 9, 3, 3, (2, 2), (1, 1), (1, 1), 1),
    (2, 33, 65, 5, 6, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    (1, 3, 64, 33, 31, 7, 7, (2, 2), (3, 3), (1, 1), 1),
    (2, 32, 32, 9, 8, 3, 3, (1, 1), (1, 1), (1, 1), 32),
    (2, 24, 40, 11, 10, 2, 3, (1, 3), (2, 0), (3, 2), 4),
    (4, 5, 1, 4, 4, 4, 4, (1, 1), (0, 0), (1, 1), 1),
    (0, 8, 8, 4, 4, 3, 3, (1, 1), (1, 1), (1, 1), 1),
]


def gated_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Tensor:
    return torch.ops.gatedkernels.gated_conv2d_cuda(x, weight, bias, *rest)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        n, c, h, w = x.shape
        wide = torch.full((w, n, 2 * c, h), torch.nan, dtype=x.dtype, device=x.device)
        return wide.permute(1, 2, 3, 0)[:, ::2].copy_(x)
    return x.contiguous()


def assert_within_budget(y: Tensor, arguments: tuple[Any, ...]) -> None:
    def is_number(argument: object) -> bool:
        return isinstance(argument, Tensor) and argument.is_floating_point()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = gated_conv2d_reference(*[a.double() if is_number(a) else a for a in arguments])
        torchs = gated_conv2d_reference(*arguments).double()
    # In float64 there is no exact result to compare with: only another order of summation.
    rounding = 100 if y.dtype == torch.float64 else 1
    budget = 2 * (torchs - exact).norm() + rounding * torch.finfo(y.dtype).eps * exact.norm()
    assert (y.double() - exact).norm() <= budget


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("channels", [0, 1, 31, 32, 33, 256, 257, 2049])
def test_plan_is_a_stable_sort(channels: int, n: int, layout: str) -> None:
    for density in (0.0, 0.4, 1.0):
        mask = torch.rand(n, channels, device="cuda") < density
        if layout == "transposed":
            mask = mask.T.contiguous().T
        elif layout == "expanded":
            mask = mask[:1].expand(n, channels)
        index, count = torch.ops.gatedkernels.plan_cuda(mask)
        assert index.dtype == count.dtype == torch.int32
        assert index.shape == (n, channels) and count.shape == (n,)
        assert torch.equal(index.long(), torch.argsort(~mask, dim=1, stable=True))
        assert torch.equal(count.long(), mask.sum(1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("density", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_within_budget(dtype: torch.dtype, shape: tuple, density: float | None, layout: str) -> None:
    n, c, k, h, w, r, s, *geometry, groups = shape
    x = laid_out(torch.randn(n, c, h, w, device="cuda", dtype=dtype), layout)
    weight = laid_out(torch.randn(k, c // groups, r, s, device="cuda", dtype=dtype), layout)
    bias = torch.randn(2 * k, device="cuda", dtype=dtype)[::2]
    in_mask = out_mask = None
    if density is not None:
        in_mask = (torch.rand(c, n, device="cuda") < density).T
        out_mask = torch.rand(n, k, device="cuda") < density
        x.masked_fill_(~in_mask[:, :, None, None], torch.nan)
    for masks in ((in_mask, out_mask), (in_mask, None)):
        y = gated_conv2d(x, weight, bias, *masks, *geometry, groups)
        assert_within_budget(y, (x, weight, bias, *masks, *geometry, groups))
        if masks[1] is not None:
            assert (y[~masks[1]] == 0).all()
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


def test_offsets_beyond_32_bits() -> None:
    far = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    memory = torch.empty(far + 4096, device="cuda", dtype=torch.float16)
    x = memory.as_strided((2, 2, 3, 3), (far, 1024, 3, 1)).copy_(torch.randn(2, 2, 3, 3))
    weight = torch.randn(3, 2, 3, 3, device="cuda", dtype=torch.float16)
    arguments = (x, weight, None, None, None, (1, 1), (1, 1), (1, 1), 1)
    assert_within_budget(gated_conv2d(*arguments), arguments)


def test_same_bits_every_time() -> None:
    x, weight = torch.randn(4, 96, 14, 14, device="cuda"), torch.randn(96, 96, 3, 3, device="cuda")
    mask = torch.rand(4, 96, device="cuda") < 0.4
    first, *others = (gated_conv2d(x, weight, None, mask, mask, (1, 1), (1, 1), (1, 1), 1) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_graph_follows_changing_masks() -> None:
    x, weight = torch.randn(4, 64, 8, 8, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    in_mask, out_mask = (torch.rand(4, 64, device="cuda") < 0.5 for _ in range(2))
    rest = ((1, 1), (1, 1), (1, 1), 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have run before
        gated_conv2d(x, weight, None, in_mask, out_mask, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated_conv2d(x, weight, None, in_mask, out_mask, *rest)
    for density in (0.0, 0.3, 0.9, 1.0):
        in_mask.copy_(torch.rand(4, 64, device="cuda") < density)
        out_mask.copy_(torch.rand(4, 64, device="cuda") < density)
        graph.replay()
        assert_within_budget(y, (x, weight, None, in_mask, out_mask, *rest))


def test_no_host_synchronisation() -> None:
    x, weight = torch.randn(4, 64, 8, 8, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    mask = torch.rand(4, 64, device="cuda") < 0.5
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.gatedkernels.plan_cuda(mask)
        gated_conv2d(x, weight, None, mask, mask, (1, 1), (1, 1), (1, 1), 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    x, weight = torch.randn(4, 64, 8, 8, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    rest = ((1, 1), (1, 1), (1, 1), 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the input is filled late; a kernel on another stream would not wait for it
        late = torch.zeros_like(x).copy_(x)
        mask = torch.ones(4, 64, device="cuda", dtype=torch.bool)
        y = gated_conv2d(late, weight, None, mask, None, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    assert_within_budget(y, (x, weight, None, None, None, *rest))
