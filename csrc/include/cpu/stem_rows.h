// The first convolution of a network: few channels, a window of any size. The taps of one of its rows are neighbours in
// an NHWC image, so every value is broadcast to vectors of output channels, row by row of the window.
// L lanes; a tile is P pixels times two vectors of output channels.
#pragma once

#include "cpu/rows.h"

namespace gatedkernels {

template <int L>
struct StemRows {
  static constexpr int kVectors = 2;
  static constexpr int kMostPixels = kAccumulators<L> / kVectors;

  template <int P>
  static void tile(const StemConv& conv, const float* in, const float* weight, int lane, float* y) {
    const int valid = conv.K - lane, taps = conv.S * conv.C;
    const int64_t step = int64_t{conv.stride} * conv.C;
    Vector<L> sum[P][kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int rest = valid - v * L;
      const float* bias = conv.bias + lane + v * L;
      const Vector<L> first = rest >= L ? load<L>(bias) : rest > 0 ? load_first<L>(bias, rest) : Vector<L>{};
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sum[p][v] = first;
    }
    for (int r = 0; r < conv.S; ++r, in += conv.line) {
      for (int i = 0; i < taps; ++i, weight += kBlock) {
        Vector<L> w[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          w[v] = load<L>(weight + v * L);
          pin(w[v]);
        }
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          Vector<L> value = broadcast<L>(in[p * step + i]);
          pin(value);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[p][v] += value * w[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int rest = valid - v * L;
        const Vector<L> out = conv.relu ? relu<L>(sum[p][v]) : sum[p][v];
        float* to = y + int64_t{p} * conv.K + lane + v * L;
        if (rest >= L) {
          store<L>(to, out);
        } else if (rest > 0) {
          store_first<L>(to, out, rest);
        }
      }
    }
  }

  using Tile = void (*)(const StemConv&, const float*, const float*, int, float*);

  static void run(const StemConv& conv, const float* padded, int rows, float* y) {
    static constexpr auto kTiles = []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<Tile, kMostPixels>{tile<P + 1>...};
    }(std::make_integer_sequence<int, kMostPixels>{});
    const RowCut cut(conv.OW, (conv.OW + kMostPixels - 1) / kMostPixels);
    const int64_t block = int64_t{conv.S} * conv.S * conv.C * kBlock;
    for (int row = 0; row < rows; ++row, padded += conv.stride * conv.line, y += int64_t{conv.OW} * conv.K) {
      for (int i = 0, pixel = 0; i < cut.tiles; ++i) {
        const int width = cut.size + (i < cut.larger ? 1 : 0);
        for (int lane = 0; lane < conv.K; lane += kVectors * L) {
          kTiles[width - 1](conv, padded + int64_t{pixel} * conv.stride * conv.C,
                            conv.weight + lane / kBlock * block + lane % kBlock, lane, y + int64_t{pixel} * conv.K);
        }
        pixel += width;
      }
    }
  }
};

}  // namespace gatedkernels
