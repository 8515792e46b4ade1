// The in-gated kernel of a 3 x 3 convolution of stride 2 turned round: from planes of the gradient of its output to the
// gradient of its input. Of the taps of an input pixel one, two or four fall onto pixels of the output, so a tile is
// pairs of rows times P pairs of pixels times up to two vectors of channels: all nine taps of a filter are used once.
#pragma once

#include "cpu/rows.h"

namespace gatedkernels {

template <int L>
struct SpreadRows {
  static constexpr int kMostPixels = 3;
  static constexpr int kVectors = L == 16 ? 2 : 1;
  static constexpr int kChannels = 2 * kChain;  // whose products are added one after another

  template <int P>
  struct Sums {
    Vector<L> at[2][2][P][kVectors];  // even and odd rows, even and odd pixels
  };

  // Lower, Right: the output has a row below, and a pixel right of the tile.
  template <int P, bool Lower, bool Right>
  static GK_INLINE void channel(Sums<P>& sum, const float* plane, int width, const float* weight) {
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        // The window is mirrored: its last row and column reach the output's next ones.
        const int down = r == 2, across = s == 2;
        if (down && !Lower) continue;
        Vector<L> w[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          w[v] = load<L>(weight + (3 * r + s) * kBlock + v * L);
          pin(w[v]);
        }
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) {
          if (across && !Right && p == P - 1) continue;
          Vector<L> value = broadcast<L>(plane[down * width + p + across]);
          pin(value);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum.at[r != 1][s != 1][p][v] += value * w[v];
        }
      }
    }
  }

  template <int P, bool Lower, bool Right>
  static void tile(const InConv& conv, const float* planes, const int32_t* channels, int from, int to, int lane,
                   int row, int pixel, float* y) {
    const Geometry& g = conv.size;
    const float* weight = conv.weight + int64_t{lane / kBlock} * conv.C * 9 * kBlock + lane % kBlock;
    const float* at = planes + int64_t{row} * g.OW + pixel;
    Sums<P> sum = {};
    for (int j = from; j < to; ++j) {
      channel<P, Lower, Right>(sum, at + j * conv.channel_step, g.OW, weight + int64_t{channels[j]} * 9 * kBlock);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (2 * row + i >= g.H) break;
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int x = 2 * (pixel + p) + k;
          if (x >= g.W) break;
          float* to_pixel = y + ((2 * int64_t{row} + i) * g.W + x) * conv.K + lane;
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) add(to_pixel + v * L, conv.K - lane - v * L, from > 0, sum.at[i][k][p][v]);
        }
      }
    }
  }

  static GK_INLINE void add(float* to, int valid, bool more, Vector<L> v) {
    if (valid >= L) {
      store<L>(to, more ? load<L>(to) + v : v);
    } else if (valid > 0) {
      store_first<L>(to, more ? load_first<L>(to, valid) + v : v, valid);
    }
  }

  template <int P>
  static void tiles(const InConv& conv, const float* planes, const int32_t* channels, int from, int to, int lane,
                    int row, int pixel, float* y) {
    const bool lower = row + 1 < conv.size.OH, right = pixel + P < conv.size.OW;
    auto* chosen = lower ? right ? tile<P, true, true> : tile<P, true, false>
                         : right ? tile<P, false, true> : tile<P, false, false>;
    chosen(conv, planes, channels, from, to, lane, row, pixel, y);
  }

  static void run(const InConv& conv, const float* planes, const int32_t* channels, int count, int block, int row,
                  int end, float* y) {
    constexpr decltype(&tiles<1>) kTiles[kMostPixels] = {tiles<1>, tiles<2>, tiles<3>};
    const RowCut cut(conv.size.OW, (conv.size.OW + kMostPixels - 1) / kMostPixels);
    const int first = block * kBlock, last = first + kBlock < conv.K ? first + kBlock : conv.K;
    for (; row < end; ++row) {
      int from = 0;
      do {  // without a channel, zeros
        const int to = count - from > kChannels ? from + kChannels : count;
        for (int i = 0, pixel = 0; i < cut.tiles; ++i) {
          const int width = cut.size + (i < cut.larger ? 1 : 0);
          for (int lane = first; lane < last; lane += kVectors * L) {
            kTiles[width - 1](conv, planes, channels, from, to, lane, row, pixel, y);
          }
          pixel += width;
        }
        from = to;
      } while (from < count);
    }
  }
};

}  // namespace gatedkernels
