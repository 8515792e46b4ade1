// Winograd's tiles in bfloat16: what tiles.h, out_tiles.h and in_tiles.h do, on pairs of neighbouring input channels
// that share a lane. Pixels and weights are bfloat16, transforms are computed in float32 and components rounded once;
// the products of pairs are added in float32. AVX512-BF16, as bfloat16.h.
//
// Where pairs are only moved they pass for floats.
#pragma once

#include "cpu/bfloat16.h"
#include "cpu/bring.h"
#include "cpu/out_tiles.h"
#include "cpu/tiles.h"

namespace gatedkernels {

// Pairs of bfloat16, in M lanes.
template <int M>
struct Pairs {
  typedef uint32_t Bits __attribute__((vector_size(M * sizeof(uint32_t))));

  // The first and the second of each pair.
  static GK_INLINE Vector<M> first(Vector<M> pairs) { return (Vector<M>)((Bits)pairs << 16); }
  static GK_INLINE Vector<M> second(Vector<M> pairs) { return (Vector<M>)((Bits)pairs & 0xffff0000u); }

  static GK_INLINE Vector<M> rounded(Vector<M> a, Vector<M> b) {
    if constexpr (M == 16) {
      const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                             23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      return (Vector<M>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    } else if constexpr (M == 8) {
      const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
      return (Vector<M>)_mm256_permutexvar_epi16(order, (__m256i)_mm256_cvtne2ps_pbh(b, a));
    } else {
      static_assert(M == 4);
      const __m128i halves = (__m128i)_mm_cvtne2ps_pbh(b, a);
      return (Vector<M>)_mm_unpacklo_epi16(halves, _mm_unpackhi_epi64(halves, halves));
    }
  }

  static GK_INLINE Vector<M> multiplied_add(Vector<M> sum, Vector<M> a, Vector<M> b) {
    if constexpr (M == 16) {
      return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    } else if constexpr (M == 8) {
      return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
    } else {
      static_assert(M == 4);
      return _mm_dpbf16_ps(sum, (__m128bh)a, (__m128bh)b);
    }
  }
};

struct PairProducts {
  static constexpr int kPaired = 2;

  template <int M>
  static GK_INLINE void add(Vector<M>& sum, Vector<M> a, Vector<M> b) {
    sum = Pairs<M>::multiplied_add(sum, a, b);
  }
};

struct PairTiles {
  using Plain = Tiles<16>;

  // As Tiles::transform_row, of pairs. Rows 1 and 2 of the components first, then 0 and 3: all would not fit into the
  // registers.
  static __attribute__((noinline)) void transform_row(const float* corner, int64_t table, int64_t pitch, int count,
                                                      float* to, int64_t step) {
    cover_beyond<16>(count, [=](int i, auto lanes) __attribute__((always_inline)) {
      constexpr int M = decltype(lanes)::value;
      using P = Pairs<M>;
      auto entry = [&](int c, int r) __attribute__((always_inline)) {
        return load<M>(corner + i + c % 2 * table + c / 2 + r % 2 * 2 * table + r / 2 * pitch);
      };
      auto columns = [&](const Vector<M> (&a)[4], const Vector<M> (&b)[4], float* row) __attribute__((always_inline)) {
        asm("" : "+r"(row));  // as in Tiles
        store<M>(row, P::rounded(a[0] - a[2], b[0] - b[2]));
        store<M>(row + step, P::rounded(a[1] + a[2], b[1] + b[2]));
        store<M>(row + 2 * step, P::rounded(a[2] - a[1], b[2] - b[1]));
        store<M>(row + 3 * step, P::rounded(a[1] - a[3], b[1] - b[3]));
      };
      Vector<M> a[2][4], b[2][4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const Vector<M> d1 = entry(c, 1), d2 = entry(c, 2);
        a[0][c] = P::first(d1) + P::first(d2), a[1][c] = P::first(d2) - P::first(d1);
        b[0][c] = P::second(d1) + P::second(d2), b[1][c] = P::second(d2) - P::second(d1);
      }
      columns(a[0], b[0], to + i + 4 * step);
      columns(a[1], b[1], to + i + 8 * step);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const Vector<M> d0 = entry(c, 0), d1 = entry(c, 1), d2 = entry(c, 2), d3 = entry(c, 3);
        a[0][c] = P::first(d0) - P::first(d2), a[1][c] = P::first(d1) - P::first(d3);
        b[0][c] = P::second(d0) - P::second(d2), b[1][c] = P::second(d1) - P::second(d3);
      }
      columns(a[0], b[0], to + i);
      columns(a[1], b[1], to + i + 12 * step);
    });
  }

  static void from_image(const TileGrid& grid, Strip strip, const Bf16* x, int64_t C, const Components& components,
                         float* scratch) {
    Plain::from_image<transform_row>(grid, strip, reinterpret_cast<const float*>(x), C / 2, 0, static_cast<int>(C / 2),
                                     components, scratch);
  }

  static void from_planes(const TileGrid& grid, Strip strip, const Bf16* planes, int64_t plane, int pairs,
                          const Components& components, float* scratch) {
    Plain::from_planes<transform_row>(grid, strip, reinterpret_cast<const float*>(planes), plane / 2, 0, pairs,
                                      components, scratch);
  }
};

struct OutPairTiles {
  using Kernel = OutTiles<16, PairProducts>;

  static float bias_of(const OutConvOf<Bf16>& conv, int32_t channel) {
    return conv.bias ? BFloat16::widened(conv.bias[channel]) : 0.0f;
  }

  // From the products of a pair of output channels, or of an odd last one, to their pixels.
  static void finish(const OutConvOf<Bf16>& conv, const TileGrid& grid, Strip strip, const float* products,
                     int64_t step, const int32_t* channels, int count, float* plane, float* lines) {
    for (int at = 0; at < strip.tiles(); at += 16) {
      Vector<16> y[2][4] = {};
      for (int t = 0; t < count; ++t) {
        Vector<16> m[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) m[i] = load<16>(products + (16 * t + i) * step + at);
        Tiles<16>::pixels<16>(m, y[t]);
        const float bias = bias_of(conv, channels[t]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          y[t][i] += bias;
          if (conv.relu) y[t][i] = BFloat16::relu(y[t][i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store<16>(lines + i * step + at, Pairs<16>::rounded(y[0][i], y[1][i]));
    }
    Kernel::place(grid, strip, lines, step, plane);
  }

  static void run(const OutConvOf<Bf16>& conv, const TileGrid& grid, Strip strip, const Components& v,
                  const int32_t* channels, int count, int listed, Bf16* planes, float* scratch) {
    const OutConv pairs{conv.size, conv.C / 2, reinterpret_cast<const float*>(conv.weight), nullptr, conv.plane / 2,
                        conv.relu, conv.turns};
    float* const lines = scratch + Kernel::kMostChannels * 16 * v.pitch;
    Kernel::multiply_all(pairs, strip, v, channels, count, listed, scratch, [&](int j, int many) {
      for (int t = 0; t < many; t += 2) {
        finish(conv, grid, strip, scratch + t * 16 * v.pitch, v.pitch, channels + j + t, many - t < 2 ? 1 : 2,
               reinterpret_cast<float*>(planes) + (j + t) / 2 * pairs.plane, lines);
      }
    });
  }
};

struct InPairTiles {
  static constexpr int kMostTiles = 12;
  static constexpr int kSoon = 4;  // channels
  static constexpr int kHalfRow = kTileRow / 2;

  static GK_INLINE int64_t row_of(const int32_t* channels, int j) { return channels[j] * int64_t{kTileRow}; }

  // As InTiles::multiply.
  template <int P>
  static void multiply(const Bf16* weight, int64_t C, const Bf16* next, const float* v, int64_t pitch, int64_t step,
                       const int32_t* channels, int count, bool cold, float* products) {
    static constexpr Bf16 kZeros[kBlock] = {};
    const int64_t quarter = C * kTileRow;
    for (int component = 0; component < 16; ++component) {
      Vector<16> sum[P][2] = {};
      const float* in = v + component * step;
      const Bf16* const four = weight + component / 4 * quarter;
      const Bf16* const soon = component / 4 < 3 ? four + quarter : next;
      const Bf16* const rows = four + component % 4 * kBlock;
      int ahead = component % 4 * ((count + 1) / 2);  // halves of rows of the next four that have been fetched
      for (int j = 0; j < count; j += 2, ++ahead, in += pitch) {
        if (component == 0 && cold) {
          for (int late = j + kSoon; late < j + kSoon + 2 && late < count; ++late) {
            bring(four + row_of(channels, late), kTileRow);
          }
        }
        if (soon && ahead / 2 < count) bring(soon + row_of(channels, ahead / 2) + ahead % 2 * kHalfRow, kHalfRow);
        const Bf16* const row[2] = {rows + row_of(channels, j),
                                    j + 1 < count ? rows + row_of(channels, j + 1) : kZeros};
        __m512i w[2];
        BFloat16::load_weights(row, 0, w);
        pin(w[0]), pin(w[1]);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          __m512i value = BFloat16::spread(reinterpret_cast<const Bf16*>(in + p));
          pin(value);
          BFloat16::multiply_add(sum[p][0], value, w[0]);
          BFloat16::multiply_add(sum[p][1], value, w[1]);
        }
      }
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        store<16>(products + (component * P + p) * kBlock, sum[p][0]);
        store<16>(products + (component * P + p) * kBlock + 16, sum[p][1]);
      }
    }
  }

  using Multiply = void (*)(const Bf16*, int64_t, const Bf16*, const float*, int64_t, int64_t, const int32_t*, int,
                            bool, float*);

  // As InTiles::finish: one tile of `valid` output channels.
  static GK_INLINE void finish(const InConvOf<Bf16>& conv, const float* products, int64_t step, int rows, int columns,
                               int valid, const Vector<16> (&bias)[2], const Bf16* residual, Bf16* y) {
    Vector<16> out[2][4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Vector<16> m[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) m[c] = load<16>(products + c * step + i * 16);
      Tiles<16>::pixels<16>(m, out[i]);
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        const int64_t at = (int64_t{r} * conv.size.OW + c) * conv.K;
        Vector<16> value[2] = {};
        if (residual) BFloat16::load_pixel(residual + at, valid, value);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          value[i] += out[i][2 * r + c] + bias[i];
          if (conv.relu) value[i] = BFloat16::relu(value[i]);
        }
        BFloat16::store_pixel(y + at, valid, value);
      }
    }
  }

  // Brings nearer what the pixels of some tiles are added to and written to, behind the arithmetic.
  static void fetch(const InConvOf<Bf16>& conv, const TileGrid& grid, int tile, int count, int lane,
                    const Bf16* residual, const Bf16* y) {
    const Geometry& g = grid.size;
    for (int row = tile / grid.columns, column = tile % grid.columns; count > 0; --count) {
      for (int r = 2 * row; r < 2 * row + 2 && r < g.OH; ++r) {
        for (int c = 2 * column; c < 2 * column + 2 && c < g.OW; ++c) {
          const int64_t pixel = (int64_t{r} * g.OW + c) * conv.K + lane;
          __builtin_prefetch(y + pixel, 1);
          if (residual) __builtin_prefetch(residual + pixel);
        }
      }
      if (++column == grid.columns) column = 0, ++row;
    }
  }

  static void run(const InConvOf<Bf16>& conv, const TileGrid& grid, Strip strip, const Components& v,
                  const int32_t* channels, int count, int block, int last, const Bf16* residual, Bf16* y,
                  float* scratch) {
    static constexpr auto kMultiply = []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<Multiply, kMostTiles>{multiply<P + 1>...};
    }(std::make_integer_sequence<int, kMostTiles>{});
    const Geometry& g = grid.size;
    const int tiles = strip.tiles(), groups = (tiles + kMostTiles - 1) / kMostTiles;
    const int blocks = (conv.K + kBlock - 1) / kBlock;
    const int64_t block_elements = 4 * int64_t{conv.C} * kTileRow;
    for (int mine = block; mine < last; ++mine) {
      const int lane = mine * kBlock, valid = conv.K - lane;
      const int soon = mine + 1 < last ? mine + 1 : mine + 1 + (conv.turns - 1) * (last - block);
      const bool known = mine + 1 < last || (conv.turns > 0 && soon < blocks);
      const Bf16* const weight = conv.weight + mine * block_elements;
      Vector<16> bias[2] = {};
      if (conv.bias) BFloat16::load_pixel(conv.bias + lane, valid, bias);
      for (int group = 0, at = 0; group < groups; ++group) {
        const int many = (tiles - at + groups - group - 1) / (groups - group);
        fetch(conv, grid, strip.first + at, many, lane, residual, y);
        const Bf16* next = known && group + 1 == groups ? conv.weight + soon * block_elements : nullptr;
        kMultiply[many - 1](weight, conv.C, next, v.data + at, v.pitch, v.step, channels, count,
                            group == 0 && mine == block, scratch);
        for (int p = 0; p < many; ++p, ++at) {
          const int row = 2 * ((strip.first + at) / grid.columns), column = 2 * ((strip.first + at) % grid.columns);
          const int64_t pixel = (int64_t{row} * g.OW + column) * conv.K + lane;
          finish(conv, scratch + p * kBlock, int64_t{many} * kBlock, row + 1 < g.OH ? 2 : 1, column + 1 < g.OW ? 2 : 1,
                 valid, bias, residual ? residual + pixel : nullptr, y + pixel);
        }
      }
    }
  }
};

}  // namespace gatedkernels
