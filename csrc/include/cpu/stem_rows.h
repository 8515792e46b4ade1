// The first convolution of a network: few channels, a window of any size. The taps of one of its rows are neighbours in
// an NHWC image, so every value is broadcast to vectors of output channels, row by row of the window.
// A tile is P pixels times two vectors of output channels.
#pragma once

#include "cpu/numbers.h"
#include "cpu/rows.h"

namespace gatedkernels {

template <class Numbers>
struct StemRows {
  using Element = typename Numbers::Element;
  using Operand = typename Numbers::Operand;
  using Conv = StemConvOf<Element>;
  static constexpr int L = Numbers::kLanes;
  static constexpr int kPaired = Numbers::kPaired;
  static constexpr int kVectors = 2;
  static constexpr int kMostPixels = kAccumulators<L> / kVectors;

  // The products of one tap, or of one pair of them, of the window's row.
  template <int P>
  static GK_INLINE void add(Vector<L> (&sum)[P][kVectors], const Element* in, int64_t step,
                            const Element* const (&rows)[kPaired], bool last) {
    Operand w[kVectors];
    Numbers::load_weights(rows, 0, w);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) pin(w[v]);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      Operand value = last ? Numbers::spread_one(in + p * step) : Numbers::spread(in + p * step);
      pin(value);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) Numbers::multiply_add(sum[p][v], value, w[v]);
    }
  }

  template <int P>
  static void tile(const Conv& conv, const Element* in, const Element* weight, int lane, Element* y) {
    static constexpr Element kZeros[kBlock] = {};
    const int valid = conv.K - lane, taps = conv.S * conv.C;
    const int64_t step = int64_t{conv.stride} * conv.C;
    Vector<L> bias[kVectors], sum[P][kVectors];
    Numbers::load_pixel(conv.bias + lane, valid, bias);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[p][v] = bias[v];
    }
    for (int r = 0; r < conv.S; ++r, in += conv.line) {
      int i = 0;
      for (; i + kPaired <= taps; i += kPaired, weight += kPaired * kBlock) {
        if constexpr (kPaired == 2) {
          add<P>(sum, in + i, step, {weight, weight + kBlock}, false);
        } else {
          add<P>(sum, in + i, step, {weight}, false);
        }
      }
      if constexpr (kPaired == 2) {
        if (i < taps) {
          add<P>(sum, in + i, step, {weight, kZeros}, true);
          weight += kBlock;
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        if (conv.relu) sum[p][v] = Numbers::relu(sum[p][v]);
      }
      Numbers::store_pixel(y + int64_t{p} * conv.K + lane, valid, sum[p]);
    }
  }

  using Tile = void (*)(const Conv&, const Element*, const Element*, int, Element*);

  static void run(const Conv& conv, const Element* padded, int rows, Element* y) {
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
