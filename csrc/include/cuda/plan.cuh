// From mask to work: the channels of every sample, active ones first.
//
// N batch, G groups, C channels of one group, A active channels of one row; a row is one group of one sample.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "grid.cuh"

namespace gatedkernels {

constexpr int kWarpSize = 32;
constexpr int kMaxPlanWarps = 8;

struct PlanArguments {
  const bool* mask;  // (N, G * C), any strides
  int32_t* index;    // (N, G, C), contiguous: within a row, its active channels ascending, then the others ascending
  int32_t* count;    // (N, G), contiguous: A
  int64_t N, G, C;
  int64_t stride_n, stride_c;
};

__host__ __device__ inline int CountBits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

__host__ __device__ inline bool IsActive(const PlanArguments& call, int64_t row, int64_t channel) {
  const int64_t n = row / call.G;
  const int64_t group = row - n * call.G;
  return channel < call.C && call.mask[n * call.stride_n + (group * call.C + channel) * call.stride_c];
}

// How many channels of the chunk are active, of which `ballots` holds one bit each; only those before `thread`.
__host__ __device__ inline int64_t CountActiveBefore(const uint32_t* ballots, int thread) {
  const int warp = thread / kWarpSize;
  int64_t active = 0;
  for (int w = 0; w < warp; ++w) active += CountBits(ballots[w]);
  return active + CountBits(ballots[warp] & ((uint32_t{1} << (thread % kWarpSize)) - 1));
}

// The inactive channels before channel c are c less the active ones before it, so one prefix sum places both kinds.
__host__ __device__ inline int64_t PlacePlanned(bool is_active, int64_t channel, int64_t active_before,
                                                int64_t num_active) {
  return is_active ? active_before : num_active + channel - active_before;
}

// One block a row. Two passes over the mask, because the inactive channels start where the active ones end.
static __global__ void __launch_bounds__(kMaxPlanWarps* kWarpSize)
    PlanForwardKernel(const __grid_constant__ PlanArguments call) {
  __shared__ uint32_t ballots[kMaxPlanWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  for (int64_t row = blockIdx.x; row < call.N * call.G; row += gridDim.x) {
    int64_t num_active = 0;
    for (int64_t first = 0; first < call.C; first += num_threads) {
      num_active += __syncthreads_count(IsActive(call, row, first + thread));
    }
    int64_t active_before_chunk = 0;
    for (int64_t first = 0; first < call.C; first += num_threads) {
      const int64_t channel = first + thread;
      const bool is_active = IsActive(call, row, channel);
      const uint32_t ballot = __ballot_sync(0xffffffffu, is_active);
      if (thread % kWarpSize == 0) ballots[thread / kWarpSize] = ballot;
      __syncthreads();
      if (channel < call.C) {
        const int64_t active_before = active_before_chunk + CountActiveBefore(ballots, thread);
        call.index[row * call.C + PlacePlanned(is_active, channel, active_before, num_active)] =
            static_cast<int32_t>(channel);
      }
      for (int w = 0; w < num_threads / kWarpSize; ++w) active_before_chunk += CountBits(ballots[w]);
      __syncthreads();  // the next chunk overwrites the ballots
    }
    if (thread == 0) call.count[row] = static_cast<int32_t>(num_active);
  }
}

inline void LaunchPlanForward(const PlanArguments& call, cudaStream_t stream) {
  const int64_t rows = call.N * call.G;
  if (rows == 0) return;
  const auto warps = std::clamp<int64_t>(DivideUp(call.C, kWarpSize), 1, kMaxPlanWarps);
  PlanForwardKernel<<<CountBlocks(rows), static_cast<unsigned>(warps * kWarpSize), 0, stream>>>(call);
}

}  // namespace gatedkernels
