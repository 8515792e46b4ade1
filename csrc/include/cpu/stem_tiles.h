// The first convolution of a network where its window is seven pixels wide and moves by two: Winograd's minimal
// filtering F(3, 4) along rows (Lavin and Gray, 2016). The even and the odd pixels of a row are two images over which
// the window moves by one, with four taps and three. Three pixels of the result are sums of six components, which are
// products of polynomials at 0, 1, -1, 2, -1/2 and infinity: 11 products instead of 21 for each row of the window and
// each channel. (Four pixels from seven components would lose more digits.)
//
// A padded row has six tables of components: 2 C values of every tile, those of even pixels first, and tiles side by
// side. At infinity the odd pixels, with three taps, have nothing.
#pragma once

#include <algorithm>

#include "cpu/numbers.h"
#include "cpu/rows.h"

namespace gatedkernels {

template <int L>
struct StemTiles {
  static constexpr int kVectors = 2;
  static constexpr int kMostTiles = kAccumulators<L> / kVectors;
  static constexpr int kPixels = StemTable::kPixels, kComponents = StemTable::kComponents;
  static constexpr int kPeriod = 2 * kPixels;  // pixels of the image from tile to tile

  // Every sixth pixel of a padded row, from each of the first six on, channel by channel.
  static void split_row(const StemConv& conv, const StemTable& table, const float* padded, float* split) {
    const int64_t step = kPeriod * conv.C;
    for (int64_t at = 0; at < step; ++at, split += table.split) {
      const int64_t many = std::min((conv.line - at + step - 1) / step, table.split);
      for (int64_t t = 0; t < many; ++t) split[t] = padded[at + t * step];
      std::fill(split + many, split + table.split, 0.0f);
    }
  }

  // From the pixels of each tile, six even and six odd ones, to its components.
  static void transform_row(const StemConv& conv, const StemTable& table, const float* split, float* components) {
    for (int value = 0; value < 2 * conv.C; ++value, components += table.pitch) {
      const float* first = split + value * table.split;  // even pixels, then odd ones: 2 C neighbours of each other
      for (int64_t t = 0; t < table.pitch; t += L) {
        Vector<L> d[6];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) d[j] = load<L>(first + j % 3 * 2 * conv.C * table.split + t + j / 3);
        const Vector<L> a = d[4] - d[2], b = d[3] - d[1];
        float* to = components + t;
        store<L>(to, d[0] - d[2] + a - 1.5f * b);
        store<L>(to + table.component, a - 1.5f * d[2] - d[1] - 0.5f * d[3]);
        store<L>(to + 2 * table.component, d[4] + 0.5f * d[2] + d[1] - 2.5f * d[3]);
        store<L>(to + 3 * table.component, a + 0.5f * b);
        store<L>(to + 4 * table.component, a - 2.0f * b);
        store<L>(to + 5 * table.component, d[5] - d[3] - b - 1.5f * a);
      }
    }
  }

  // Components of T tiles of the result, of two vectors of output channels.
  template <int T>
  static void multiply(const StemConv& conv, const StemTable& table, const float* components, const float* weight,
                       float* products) {
    for (int n = 0; n < kComponents; ++n, components += table.component, products += kVectors * L) {
      const int values = n + 1 < kComponents ? 2 * conv.C : conv.C;
      Vector<L> sum[T][kVectors] = {};
      for (int r = 0; r < conv.S; ++r, weight += 2 * conv.C * kBlock) {
        const float *in = components + r * table.row, *w = weight;
        for (int i = 0; i < values; ++i, in += table.pitch, w += kBlock) {
          Vector<L> w0 = load<L>(w), w1 = load<L>(w + L);
          pin(w0), pin(w1);
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) {
            Vector<L> value = broadcast<L>(in[t]);
            pin(value);
            sum[t][0] += value * w0, sum[t][1] += value * w1;
          }
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store<L>(products + t * kComponents * kVectors * L + v * L, sum[t][v]);
      }
    }
  }

  // The pixels of a tile, `many` of them inside the image.
  static void finish(const StemConv& conv, const float* products, int many, int lane, float* y) {
    using Numbers = Float32<L>;
    const int valid = conv.K - lane;
    Vector<L> bias[kVectors], pixels[kPixels][kVectors];
    Numbers::load_pixel(conv.bias + lane, valid, bias);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, products += L) {
      Vector<L> m[kComponents];
#pragma GCC unroll 6
      for (int n = 0; n < kComponents; ++n) m[n] = load<L>(products + n * kVectors * L);
      const Vector<L> a = m[1] + m[2], b = m[1] - m[2];
      pixels[0][v] = bias[v] + (m[0] + a + m[3] + m[4]);
      pixels[1][v] = bias[v] + (b + 2.0f * m[3] - 0.5f * m[4]);
      pixels[2][v] = bias[v] + (a + 4.0f * m[3] + 0.25f * m[4] + m[5]);
    }
#pragma GCC unroll 3
    for (int p = 0; p < kPixels; ++p, y += conv.K) {
      if (p >= many) return;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        if (conv.relu) pixels[p][v] = Numbers::relu(pixels[p][v]);
      }
      Numbers::store_pixel(y + lane, valid, pixels[p]);
    }
  }

  using Multiply = void (*)(const StemConv&, const StemTable&, const float*, const float*, float*);

  static void run(const StemConv& conv, const float* padded, int rows, float* scratch, float* y) {
    static constexpr auto kMultiply = []<int... T>(std::integer_sequence<int, T...>) {
      return std::array<Multiply, kMostTiles>{multiply<T + 1>...};
    }(std::make_integer_sequence<int, kMostTiles>{});
    const StemTable table(conv);
    float *const products = scratch, *const split = products + StemTable::kProducts;
    float* components = split + table.split * kPeriod * conv.C;
    const int read = (rows - 1) * conv.stride + conv.S;
    for (int row = 0; row < read; ++row, padded += conv.line) {
      split_row(conv, table, padded, split);
      transform_row(conv, table, split, components + row * table.row);
    }
    const RowCut cut(table.tiles, (table.tiles + kMostTiles - 1) / kMostTiles);
    const int64_t block = int64_t{kComponents} * conv.S * 2 * conv.C * kBlock;
    for (int row = 0; row < rows; ++row, components += conv.stride * table.row, y += int64_t{conv.OW} * conv.K) {
      for (int i = 0, tile = 0; i < cut.tiles; ++i) {
        const int many = cut.size + (i < cut.larger ? 1 : 0);
        for (int lane = 0; lane < conv.K; lane += kVectors * L) {
          kMultiply[many - 1](conv, table, components + tile, conv.weight + lane / kBlock * block + lane % kBlock,
                              products);
          for (int t = 0; t < many; ++t) {
            const int pixel = (tile + t) * kPixels;
            finish(conv, products + t * kComponents * kVectors * L, conv.OW - pixel, lane,
                   y + int64_t{pixel} * conv.K);
          }
        }
        tile += many;
      }
    }
  }
};

}  // namespace gatedkernels
