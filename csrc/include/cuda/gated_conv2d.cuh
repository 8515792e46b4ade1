// The gated convolution for any shape: an implicit matrix product over each sample's own channels.
//
// N batch, G groups, C in-channels and K out-channels of one group, H W image, R S window, P Q output image,
// A active in-channels of one group of one sample.
//
// A tile is some pixels by some out-channels of one group of one sample. Its out-channels are taken in the order of
// the plan, so the open ones are neighbours and a tile that holds none skips the whole reduction. It reduces over
// A * R * S products: closed in-channels are in no list and are never read.
//
// What one thread does between two barriers is a host-device function, so that the tests can run the kernel's own code
// without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "grid.cuh"

namespace gatedkernels {

template <typename T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__host__ __device__ inline AccumulatorOf<T> Widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename T>
__host__ __device__ inline T Round(AccumulatorOf<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename T>
struct GatedConv2dArguments {
  const T* x;       // (N, G * C, H, W), any strides
  const T* weight;  // (G * K, C, R, S), any strides
  const T* bias;    // (G * K,), any stride, or null
  T* y;             // (N, G * K, P, Q), any strides
  const int32_t* in_index;  // (N, G, C) and (N, G) from the plan, or null: all open
  const int32_t* in_count;
  const int32_t* out_index;  // (N, G, K) and (N, G) from the plan, or null: all open
  const int32_t* out_count;
  int64_t N, G, C, K, H, W, R, S, P, Q;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s;
  int64_t y_stride_n, y_stride_k, y_stride_p, y_stride_q;
  int64_t bias_stride;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// Which part of the output one tile computes; the same for all threads of its block.
struct GatedConv2dPlace {
  int64_t n, group;
  int64_t first_pixel;     // of P * Q
  int64_t first_position;  // in the group's list of out-channels
  int64_t num_open;        // out-channels of the group that are open; the list begins with them
  int64_t reduction;       // A * R * S, or 0 where the tile has no open out-channel
};

// The shared memory of a block, and what its threads do with it.
template <typename T_, int kPixelLanes, int kPixelsPerLane, int kChannelLanes, int kChannelsPerLane>
struct GatedConv2dTile {
  using T = T_;
  using Accumulator = AccumulatorOf<T>;
  using Sums = Accumulator[kPixelsPerLane][kChannelsPerLane];

  static constexpr int kThreads = kPixelLanes * kChannelLanes;
  static constexpr int kPixels = kPixelLanes * kPixelsPerLane;
  static constexpr int kChannels = kChannelLanes * kChannelsPerLane;
  static constexpr int kDepth = 16;  // products reduced between two barriers

  // Input row and column under the window's first tap; a pixel outside the output has a row outside the input.
  int64_t row[kPixels];
  int64_t column[kPixels];
  // What each product of this chunk adds to a pixel's row and column, and to the pointers.
  int64_t row_shift[kDepth];
  int64_t column_shift[kDepth];
  int64_t x_shift[kDepth];
  int64_t weight_shift[kDepth];
  // Out-channel (counted from the group's first) at each position of the tile, or -1 past the group's end.
  int32_t channel[kChannels];
  // One column more than is used: threads that fill neighbouring rows then write to different banks.
  Accumulator x_tile[kDepth][kPixels + 1];
  Accumulator weight_tile[kDepth][kChannels + 1];

  __host__ __device__ static int64_t CountTiles(const GatedConv2dArguments<T>& call) {
    return call.N * call.G * DivideUp(call.K, kChannels) * DivideUp(call.P * call.Q, kPixels);
  }

  __host__ __device__ static GatedConv2dPlace Locate(const GatedConv2dArguments<T>& call, int64_t number) {
    const int64_t pixel_tiles = DivideUp(call.P * call.Q, kPixels);
    const int64_t channel_tiles = DivideUp(call.K, kChannels);
    const int64_t list = number / pixel_tiles / channel_tiles;
    GatedConv2dPlace place;
    place.n = list / call.G;
    place.group = list % call.G;
    place.first_pixel = number % pixel_tiles * kPixels;
    place.first_position = number / pixel_tiles % channel_tiles * kChannels;
    place.num_open = call.out_count ? call.out_count[list] : call.K;
    const int64_t num_active = call.in_count ? call.in_count[list] : call.C;
    place.reduction = place.first_position < place.num_open ? num_active * call.R * call.S : 0;
    return place;
  }

  // Neighbouring threads take what is neighbouring in y.
  __host__ __device__ static int PixelLane(const GatedConv2dArguments<T>& call, int thread) {
    return call.y_stride_k == 1 ? thread / kChannelLanes : thread % kPixelLanes;
  }
  __host__ __device__ static int ChannelLane(const GatedConv2dArguments<T>& call, int thread) {
    return call.y_stride_k == 1 ? thread % kChannelLanes : thread / kPixelLanes;
  }

  __host__ __device__ void Prepare(const GatedConv2dArguments<T>& call, const GatedConv2dPlace& place, int thread) {
    for (int i = thread; i < kPixels; i += kThreads) {
      const int64_t pixel = place.first_pixel + i;
      const bool is_inside = pixel < call.P * call.Q;
      row[i] = is_inside ? pixel / call.Q * call.stride_h - call.padding_h : call.H;
      column[i] = is_inside ? pixel % call.Q * call.stride_w - call.padding_w : call.W;
    }
    for (int i = thread; i < kChannels; i += kThreads) {
      const int64_t position = place.first_position + i;
      const int64_t list = (place.n * call.G + place.group) * call.K;
      channel[i] = position >= call.K ? -1
                   : call.out_index   ? call.out_index[list + position]
                                      : static_cast<int32_t>(position);
    }
    PrepareReduction(call, place, 0, thread);
  }

  __host__ __device__ void PrepareReduction(const GatedConv2dArguments<T>& call, const GatedConv2dPlace& place,
                                            int64_t first, int thread) {
    const int64_t product = first + thread;
    if (thread >= kDepth || product >= place.reduction) return;
    const int64_t position = product / (call.R * call.S);
    const int64_t r = product / call.S % call.R;
    const int64_t s = product % call.S;
    const int64_t list = (place.n * call.G + place.group) * call.C;
    const int64_t c = call.in_index ? call.in_index[list + position] : position;
    row_shift[thread] = r * call.dilation_h;
    column_shift[thread] = s * call.dilation_w;
    x_shift[thread] = (place.group * call.C + c) * call.x_stride_c;
    weight_shift[thread] = c * call.weight_stride_c + r * call.weight_stride_r + s * call.weight_stride_s;
  }

  // Fills both tiles; what lies outside the image, the group or the reduction is zero and is not read.
  __host__ __device__ void Load(const GatedConv2dArguments<T>& call, const GatedConv2dPlace& place, int64_t first,
                                int thread) {
    const T* const x = call.x + place.n * call.x_stride_n;
    for (int i = thread; i < kDepth * kPixels; i += kThreads) {
      // Neighbouring threads read what is neighbouring in x.
      const int j = call.x_stride_c == 1 ? i % kDepth : i / kPixels;
      const int pixel = call.x_stride_c == 1 ? i / kDepth : i % kPixels;
      Accumulator value = 0;
      if (first + j < place.reduction) {
        const int64_t h = row[pixel] + row_shift[j];
        const int64_t w = column[pixel] + column_shift[j];
        if (h >= 0 && h < call.H && w >= 0 && w < call.W) {
          value = Widen(x[x_shift[j] + h * call.x_stride_h + w * call.x_stride_w]);
        }
      }
      x_tile[j][pixel] = value;
    }
    for (int i = thread; i < kDepth * kChannels; i += kThreads) {
      const int j = i % kDepth;
      const int position = i / kDepth;
      Accumulator value = 0;
      if (first + j < place.reduction && place.first_position + position < place.num_open) {
        const int64_t k = place.group * call.K + channel[position];
        value = Widen(call.weight[k * call.weight_stride_k + weight_shift[j]]);
      }
      weight_tile[j][position] = value;
    }
  }

  // Each chunk is summed on its own first: the rounding error then grows with the root of the number of chunks, not of
  // products, and stays near that of PyTorch's blocked sums.
  __host__ __device__ void Multiply(const GatedConv2dArguments<T>& call, int thread, Sums& sums) const {
    const int pixel_lane = PixelLane(call, thread);
    const int channel_lane = ChannelLane(call, thread);
    Sums chunk = {};
    for (int j = 0; j < kDepth; ++j) {
      for (int p = 0; p < kPixelsPerLane; ++p) {
        for (int k = 0; k < kChannelsPerLane; ++k) {
          chunk[p][k] += x_tile[j][pixel_lane + p * kPixelLanes] * weight_tile[j][channel_lane + k * kChannelLanes];
        }
      }
    }
    for (int p = 0; p < kPixelsPerLane; ++p) {
      for (int k = 0; k < kChannelsPerLane; ++k) sums[p][k] += chunk[p][k];
    }
  }

  __host__ __device__ void Store(const GatedConv2dArguments<T>& call, const GatedConv2dPlace& place, int thread,
                                 const Sums& sums) const {
    for (int p = 0; p < kPixelsPerLane; ++p) {
      const int64_t pixel = place.first_pixel + PixelLane(call, thread) + p * kPixelLanes;
      if (pixel >= call.P * call.Q) continue;
      T* const y = call.y + place.n * call.y_stride_n + pixel / call.Q * call.y_stride_p +
                   pixel % call.Q * call.y_stride_q;
      for (int k = 0; k < kChannelsPerLane; ++k) {
        const int position = ChannelLane(call, thread) + k * kChannelLanes;
        if (channel[position] < 0) continue;
        const int64_t out_channel = place.group * call.K + channel[position];
        Accumulator value = 0;
        if (place.first_position + position < place.num_open) {
          value = sums[p][k] + (call.bias ? Widen(call.bias[out_channel * call.bias_stride]) : Accumulator(0));
        }
        y[out_channel * call.y_stride_k] = Round<T>(value);
      }
    }
  }
};

template <typename T>
using GatedConv2dWideTile = GatedConv2dTile<T, 16, 4, 16, 4>;
// Groups of a few channels (depthwise, for one) would leave most of a wide tile empty.
template <typename T>
using GatedConv2dNarrowTile = GatedConv2dTile<T, 64, 4, 4, 1>;
constexpr int64_t kMaxNarrowChannels = 8;

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    GatedConv2dForwardKernel(const __grid_constant__ GatedConv2dArguments<typename Tile::T> call) {
  __shared__ Tile tile;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t number = blockIdx.x; number < Tile::CountTiles(call); number += gridDim.x) {
    const GatedConv2dPlace place = Tile::Locate(call, number);
    typename Tile::Sums sums = {};
    tile.Prepare(call, place, thread);
    __syncthreads();
    for (int64_t first = 0; first < place.reduction; first += Tile::kDepth) {
      tile.Load(call, place, first, thread);
      __syncthreads();
      tile.Multiply(call, thread, sums);
      tile.PrepareReduction(call, place, first + Tile::kDepth, thread);
      __syncthreads();
    }
    tile.Store(call, place, thread, sums);
    __syncthreads();  // the next tile overwrites the list that Store reads
  }
}

template <typename Tile>
void LaunchGatedConv2dTiles(const GatedConv2dArguments<typename Tile::T>& call, cudaStream_t stream) {
  const int64_t tiles = Tile::CountTiles(call);
  if (tiles == 0) return;
  GatedConv2dForwardKernel<Tile><<<CountBlocks(tiles), Tile::kThreads, 0, stream>>>(call);
}

template <typename T>
void LaunchGatedConv2dForward(const GatedConv2dArguments<T>& call, cudaStream_t stream) {
  if (call.K <= kMaxNarrowChannels) {
    LaunchGatedConv2dTiles<GatedConv2dNarrowTile<T>>(call, stream);
  } else {
    LaunchGatedConv2dTiles<GatedConv2dWideTile<T>>(call, stream);
  }
}

}  // namespace gatedkernels
