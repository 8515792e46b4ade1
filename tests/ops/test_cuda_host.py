"""The CUDA kernels' own code on the CPU: what lies between two barriers, thread by thread in shuffled order."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_reference

KERNELS = Path(__file__).parents[2] / "csrc" / "include" / "cuda"
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# A block that does all the work, as a grid of one block would. Shared memory starts as NaN in every tile, and the
# threads take turns in another order in every phase: what relies on a barrier that is not there gives wrong results.
DRIVER = r"""
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gated_conv2d.cuh"
#include "plan.cuh"

using namespace gatedkernels;

namespace {

class Block {
 public:
  explicit Block(int threads) : order_(threads) { std::iota(order_.begin(), order_.end(), 0); }

  template <typename Phase>
  void Run(const Phase& phase) {
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const int thread : order_) phase(thread);
  }

 private:
  std::vector<int> order_;
  std::mt19937 random_{0};
};

template <typename Tile>
void Convolve(const void* arguments) {
  const auto& call = *static_cast<const GatedConv2dArguments<typename Tile::T>*>(arguments);
  struct Registers {
    typename Tile::Sums sums;
  };
  Block block(Tile::kThreads);
  const auto tile = std::make_unique<Tile>();
  for (int64_t number = 0; number < Tile::CountTiles(call); ++number) {
    std::memset(static_cast<void*>(tile.get()), 0xff, sizeof(Tile));
    const GatedConv2dPlace place = Tile::Locate(call, number);
    std::vector<Registers> registers(Tile::kThreads);
    block.Run([&](int thread) { tile->Prepare(call, place, thread); });
    for (int64_t first = 0; first < place.reduction; first += Tile::kDepth) {
      block.Run([&](int thread) { tile->Load(call, place, first, thread); });
      block.Run([&](int thread) {
        tile->Multiply(call, thread, registers[thread].sums);
        tile->PrepareReduction(call, place, first + Tile::kDepth, thread);
      });
    }
    block.Run([&](int thread) { tile->Store(call, place, thread, registers[thread].sums); });
  }
}

template <typename T>
void ConvolveIn(const void* arguments, bool is_narrow) {
  is_narrow ? Convolve<GatedConv2dNarrowTile<T>>(arguments) : Convolve<GatedConv2dWideTile<T>>(arguments);
}

}  // namespace

extern "C" {

void convolve_float32(const void* arguments, bool is_narrow) { ConvolveIn<float>(arguments, is_narrow); }
void convolve_float64(const void* arguments, bool is_narrow) { ConvolveIn<double>(arguments, is_narrow); }
void convolve_float16(const void* arguments, bool is_narrow) { ConvolveIn<__half>(arguments, is_narrow); }
void convolve_bfloat16(const void* arguments, bool is_narrow) { ConvolveIn<__nv_bfloat16>(arguments, is_narrow); }

void make_plan(const PlanArguments* arguments, int warps) {
  const PlanArguments& call = *arguments;
  const int threads = warps * kWarpSize;
  Block block(threads);
  for (int64_t row = 0; row < call.N * call.G; ++row) {
    int64_t num_active = 0;
    for (int64_t channel = 0; channel < call.C; ++channel) num_active += IsActive(call, row, channel);
    int64_t active_before_chunk = 0;
    for (int64_t first = 0; first < call.C; first += threads) {
      std::vector<uint32_t> ballots(warps);
      block.Run([&](int thread) {
        ballots[thread / kWarpSize] |= uint32_t{IsActive(call, row, first + thread)} << thread % kWarpSize;
      });
      block.Run([&](int thread) {
        const int64_t channel = first + thread;
        if (channel >= call.C) return;
        const int64_t before = active_before_chunk + CountActiveBefore(ballots.data(), thread);
        const int64_t place = PlacePlanned(IsActive(call, row, channel), channel, before, num_active);
        call.index[row * call.C + place] = static_cast<int32_t>(channel);
      });
      for (const uint32_t ballot : ballots) active_before_chunk += CountBits(ballot);
    }
    call.count[row] = static_cast<int32_t>(num_active);
  }
}
}
"""


class PlanArguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("mask", "index", "count")] + [
        (name, ctypes.c_int64) for name in ("N", "G", "C", "stride_n", "stride_c")
    ]


POINTERS = ("x", "weight", "bias", "y", "in_index", "in_count", "out_index", "out_count")
SIZES = (
    *("N", "G", "C", "K", "H", "W", "R", "S", "P", "Q"),
    *(f"x_stride_{dim}" for dim in "nchw"),
    *(f"weight_stride_{dim}" for dim in "kcrs"),
    *(f"y_stride_{dim}" for dim in "nkpq"),
    "bias_stride",
    *(f"{name}_{dim}" for name in ("stride", "padding", "dilation") for dim in "hw"),
)


class ConvArguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit / "bin")
    if nvcc is None:
        pytest.skip("nvcc is neither on PATH nor in CUDA_HOME")
    folder = tmp_path_factory.mktemp("cuda_host")
    source, library = folder / "driver.cu", folder / "driver.so"
    source.write_text(DRIVER)
    command = [nvcc, "-shared", "-std=c++17", "-O2", "-Xcompiler", "-fPIC", f"-I{KERNELS}", source, "-o", library]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def plan(host: ctypes.CDLL, mask: Tensor, groups: int = 1, warps: int = 2) -> tuple[Tensor, Tensor]:
    n, channels = mask.shape
    index = torch.full((n, channels), -1, dtype=torch.int32)
    count = torch.full((n * groups,), -1, dtype=torch.int32)
    pointers = (mask.data_ptr(), index.data_ptr(), count.data_ptr())
    call = PlanArguments(*pointers, n, groups, channels // groups, *mask.stride())
    host.make_plan(ctypes.byref(call), warps)
    return index, count


def convolve(
    host: ctypes.CDLL,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    geometry: tuple[list[int], list[int], list[int]],
    groups: int,
    is_narrow: bool,
) -> Tensor:
    stride, padding, dilation = geometry
    image = [
        (x.shape[dim + 2] + 2 * padding[dim] - dilation[dim] * (weight.shape[dim + 2] - 1) - 1) // stride[dim] + 1
        for dim in (0, 1)
    ]
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = torch.full((x.shape[0], weight.shape[0], *image), torch.nan, dtype=x.dtype)
    y = y.to(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
    plans = [(None, None) if mask is None else plan(host, mask, groups) for mask in (in_mask, out_mask)]
    operands = (x, weight, bias, y, *plans[0], *plans[1])
    sizes = (x.shape[0], groups, weight.shape[1], weight.shape[0] // groups, *x.shape[2:], *weight.shape[2:], *image)
    strides = (*x.stride(), *weight.stride(), *y.stride(), 0 if bias is None else bias.stride(0))
    pointers = [None if operand is None else operand.data_ptr() for operand in operands]
    call = ConvArguments(*pointers, *sizes, *strides, *stride, *padding, *dilation)
    getattr(host, f"convolve_{DTYPES[x.dtype]}")(ctypes.byref(call), is_narrow)
    return y


def assert_within_budget(y: Tensor, arguments: tuple[Any, ...]) -> None:
    def is_number(argument: object) -> bool:
        return isinstance(argument, Tensor) and argument.is_floating_point()

    exact = gated_conv2d_reference(*[a.double() if is_number(a) else a for a in arguments])
    torchs = gated_conv2d_reference(*arguments).double()
    # In float64 there is no exact result to compare with: only another order of summation.
    rounding = 100 if y.dtype == torch.float64 else 1
    budget = 2 * (torchs - exact).norm() + rounding * torch.finfo(y.dtype).eps * exact.norm()
    assert (y.double() - exact).norm() <= budget


def pick(generator: np.random.Generator, *choices: int) -> int:
    return int(generator.choice(choices))


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        n, c, h, w = x.shape
        return torch.full((w, n, 2 * c, h), torch.nan, dtype=x.dtype).permute(1, 2, 3, 0)[:, ::2].copy_(x)
    return x.contiguous()


def random_mask(generator: np.random.Generator, n: int, channels: int) -> Tensor | None:
    density = generator.choice([-1.0, 0.0, 0.3, 0.7, 1.0])
    if density < 0:
        return None
    mask = torch.from_numpy(generator.random((channels, n)) < density).T
    return mask if generator.random() < 0.5 else mask.contiguous()


@pytest.mark.parametrize("channels", [0, 1, 31, 32, 33, 64, 65, 300])
@pytest.mark.parametrize("warps", [1, 2, 8])
def test_plan_is_a_stable_sort(host: ctypes.CDLL, channels: int, warps: int) -> None:
    generator = np.random.default_rng(channels)
    for density in (0.0, 0.5, 1.0):
        mask = torch.from_numpy(generator.random((5, channels)) < density)
        for layout in (mask, mask.T.contiguous().T, mask[:1].expand(5, channels)):
            index, count = plan(host, layout, warps=warps)
            expected = torch.argsort(~layout, dim=1, stable=True) if channels else index
            assert torch.equal(index.long(), expected.long())
            assert torch.equal(count.long(), layout.sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_convolution_within_budget(host: ctypes.CDLL, seed: int, is_narrow: bool, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    groups = pick(generator, 1, 1, 2, 7)
    c, k = pick(generator, 1, 3, 9, 20), pick(generator, 1, 2, 5, 12, 70)
    n, h, w = pick(generator, 1, 2, 3), pick(generator, 4, 7, 11), pick(generator, 4, 5, 13)
    r, s = pick(generator, 1, 2, 3), pick(generator, 1, 3, 4)
    stride, padding = ([pick(generator, *choices) for _ in "hw"] for choices in ((1, 2, 3), (0, 1, 3)))
    dilation = [pick(generator, 1, 2) if (size - 1) * 2 < 4 else 1 for size in (r, s)]
    layout = ("contiguous", "channels_last", "strided")[seed % 3]
    x = laid_out(torch.randn(n, groups * c, h, w, dtype=dtype), layout)
    weight = laid_out(
        torch.randn(groups * k, c, r, s, dtype=dtype), ("strided", "contiguous", "channels_last")[seed % 3]
    )
    bias = torch.randn(2 * groups * k, dtype=dtype)[::2] if generator.random() < 0.7 else None
    in_mask, out_mask = random_mask(generator, n, groups * c), random_mask(generator, n, groups * k)
    if in_mask is not None:
        x.masked_fill_(~in_mask[:, :, None, None], torch.nan)
    geometry = (stride, padding, dilation)
    y = convolve(host, x, weight, bias, in_mask, out_mask, geometry, groups, is_narrow)
    assert_within_budget(y, (x, weight, bias, in_mask, out_mask, *geometry, groups))
    if out_mask is not None:
        assert (y[~out_mask] == 0).all()


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("channels", [64, 512])
def test_long_sums_within_budget(host: ctypes.CDLL, channels: int, is_narrow: bool) -> None:
    torch.manual_seed(channels)
    x, weight = torch.randn(2, channels, 4, 4), torch.randn(4, channels, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1])
    y = convolve(host, x, weight, None, None, None, geometry, 1, is_narrow)
    assert_within_budget(y, (x, weight, None, None, None, *geometry, 1))


@pytest.mark.parametrize("is_narrow", [False, True])
def test_offsets_beyond_32_bits(host: ctypes.CDLL, is_narrow: bool) -> None:
    # Memory that is never touched is never there: two samples, two channels, far apart.
    far = 2**31 + 5
    memory = torch.from_numpy(np.zeros(2 * far + 4096, dtype=np.int8)).view(torch.float16)
    x = memory.as_strided((2, 2, 3, 3), (far // 2, 1024, 3, 1)).copy_(torch.randn(2, 2, 3, 3))
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float16)
    geometry = ([1, 1], [1, 1], [1, 1])
    y = convolve(host, x, weight, None, None, None, geometry, 1, is_narrow)
    assert_within_budget(y, (x, weight, None, None, None, *geometry, 1))


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)])
def test_nothing_to_do(host: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(3, 4, 1, 1)
    mask = torch.ones(shape[0], 4, dtype=torch.bool)
    y = convolve(host, x, weight, None, mask, None, ([1, 1], [0, 0], [1, 1]), 1, False)
    assert y.shape == (shape[0], 3, *shape[2:])
