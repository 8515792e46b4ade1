// The out-gated kernel: lanes run along the input channels, so an active output channel is nothing but a pointer.
// A tile is R rows of P pixels times T output channels, all partial sums over the lanes in registers.
#pragma once

#include "cpu/numbers.h"
#include "cpu/rows.h"

namespace gatedkernels {

template <class Numbers>
struct OutRows {
  using Element = typename Numbers::Element;
  using Operand = typename Numbers::Operand;
  using Conv = OutConvOf<Element>;
  static constexpr int L = Numbers::kLanes;
  static constexpr int kMostPixels = L == 16 ? 12 : 6;
  static constexpr int64_t kColumnBytes = 20 << 10;

  // Output channels in a tile of this many pixels.
  static constexpr int channels_for(int pixels) {
    const int fit = kAccumulators<L> / pixels;
    return fit < 4 ? fit / Numbers::kPaired * Numbers::kPaired : 4;
  }

  template <int R, int P, int T>
  struct Sums {
    Vector<L> at[R][P][T];
  };

  // One tap of the window for the pixels [From, To) of the rows that are inside the image.
  template <bool Fetch, int R, int P, int T, int From, int To, bool Upper, bool Lower>
  static GK_INLINE void tap(Sums<R, P, T>& sum, const Conv& conv, const Element* x, int64_t step, int64_t line,
                            const Element* const* weight, const Element* const* ahead, int64_t offset) {
    const Element* ws[T];
    const Element* next[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      ws[t] = weight[t] + offset;
      if constexpr (Fetch) next[t] = ahead[t] + offset;
    }
    auto accumulate = [&](auto read) __attribute__((always_inline)) {
      Operand w[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        w[t] = read(ws[t]);
        pin(w[t]);
      }
#pragma GCC unroll 2
      for (int i = Upper ? 0 : 1; i < (Lower ? 2 : 1); ++i) {
#pragma GCC unroll 12
        for (int p = From; p < To; ++p) {
          Operand v = read(x + i * line + p * step);
          pin(v);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) Numbers::multiply_add(sum.at[i][p][t], v, w[t]);
        }
      }
    };
    constexpr int kStep = L * Numbers::kPaired;
    int c = 0;
    for (; c + kStep <= conv.C; c += kStep) {
      if constexpr (Fetch) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) __builtin_prefetch(next[t] + c, 0, 2);
      }
      accumulate([c](const Element* from) __attribute__((always_inline)) { return Numbers::load(from + c); });
    }
    if (c < conv.C) {
      const int rest = conv.C - c;
      accumulate([c, rest](const Element* from) __attribute__((always_inline)) {
        return Numbers::load_first(from + c, rest);
      });
    }
  }

  template <bool Fetch, int R, int P, int T, bool Upper, bool Lower>
  static GK_INLINE void taps(Sums<R, P, T>& sum, const Conv& conv, const Element* x, int64_t step, int64_t line,
                             const Element* const* weight, const Element* const* ahead, int64_t offset, bool left,
                             bool right) {
    const int S = conv.size.S;
    for (int s = 0; s < S; ++s, x += conv.C, offset += conv.C) {
      if (left && s == 0) {
        tap<Fetch, R, P, T, 1, P, Upper, Lower>(sum, conv, x, step, line, weight, ahead, offset);
      } else if (right && s == S - 1) {
        tap<Fetch, R, P, T, 0, P - 1, Upper, Lower>(sum, conv, x, step, line, weight, ahead, offset);
      } else {
        tap<Fetch, R, P, T, 0, P, Upper, Lower>(sum, conv, x, step, line, weight, ahead, offset);
      }
    }
  }

  // Fetch: the weights of the listed channels `ahead` are brought nearer meanwhile.
  template <bool Fetch, int R, int P, int T>
  static void tile(const Conv& conv, const Element* x, const int32_t* channels, const int32_t* next, int row, int pixel,
                   Element* planes) {
    const Geometry& g = conv.size;
    const int S = g.S;
    const int64_t filter = int64_t{S} * S * conv.C;
    const int64_t step = int64_t{g.stride} * conv.C, line = int64_t{g.W} * conv.C;
    const bool left = reads_left(g, pixel), right = reads_right(g, pixel + P - 1);
    const Element* weight[T];
    const Element* ahead[T];
    for (int t = 0; t < T; ++t) {
      weight[t] = conv.weight + channels[t] * filter;
      if constexpr (Fetch) ahead[t] = conv.weight + next[t] * filter;
    }
    Sums<R, P, T> sum = {};
    for (int r = 0; r < S; ++r) {
      const int first = input_row(g, row, r);
      const Element* in = x + first * line + (int64_t{pixel} * g.stride - S / 2) * conv.C;
      const int64_t offset = int64_t{r} * S * conv.C;
      const bool upper = inside(g, first), lower = R == 2 && inside(g, first + g.stride);
      if constexpr (R == 1) {
        if (upper) taps<Fetch, R, P, T, true, false>(sum, conv, in, step, line, weight, ahead, offset, left, right);
      } else if (upper && lower) {
        taps<Fetch, R, P, T, true, true>(sum, conv, in, step, line * g.stride, weight, ahead, offset, left, right);
      } else if (upper) {
        taps<Fetch, R, P, T, true, false>(sum, conv, in, step, line * g.stride, weight, ahead, offset, left, right);
      } else if (lower) {
        taps<Fetch, R, P, T, false, true>(sum, conv, in, step, line * g.stride, weight, ahead, offset, left, right);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
      Numbers::template store_planes<P, T>(sum.at[i], conv, channels, planes, int64_t{row + i} * g.OW + pixel);
    }
  }

  using Tile = void (*)(const Conv&, const Element*, const int32_t*, const int32_t*, int, int, Element*);
  using ByChannels = std::array<std::array<Tile, 2>, 4>;

  template <int R, int P>
  static constexpr ByChannels by_channels() {
    return []<int... T>(std::integer_sequence<int, T...>) {
      return ByChannels{std::array<Tile, 2>{tile<false, R, P, T + 1>, tile<true, R, P, T + 1>}...};
    }(std::make_integer_sequence<int, channels_for(R * P)>{});
  }

  template <int R, int Most>
  static constexpr std::array<ByChannels, Most> table() {
    return []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<ByChannels, Most>{by_channels<R, P + 1>()...};
    }(std::make_integer_sequence<int, Most>{});
  }

  // Every tile costs the same beside its arithmetic: as few of them as possible, counted for one output channel.
  template <int R, int Most>
  static RowCut best_cut(int width) {
    const int fewest = (width + Most - 1) / Most;
    RowCut best(width, fewest);
    for (int tiles = fewest + 1; tiles <= width && tiles <= 4 * fewest; ++tiles) {
      const RowCut cut(width, tiles);
      if (cut.tiles * channels_for(R * best.widest()) <= best.tiles * channels_for(R * cut.widest())) best = cut;
    }
    return best;
  }

  template <int R, int Most>
  static void walk(const Conv& conv, const Element* x, const int32_t* channels, int count, int listed, int row,
                   int end, Element* planes) {
    static constexpr auto kTiles = table<R, Most>();
    const RowCut cut = best_cut<R, Most>(conv.size.OW);
    const int most = channels_for(R * cut.widest());
    // Column by column, so that the rows of a column stay in the first-level cache; all channels of some rows of it,
    // where these rows are small enough to stay there for all of them.
    const int64_t row_bytes = int64_t{cut.size + 3} * conv.size.stride * conv.C * static_cast<int64_t>(sizeof(Element));
    const int few = static_cast<int>(kColumnBytes / (row_bytes * conv.size.stride)) / R * R;
    const int band = few >= 4 * R ? few : end - row;
    for (int from = row; from + R <= end; from += band) {
      const int to = from + band < end ? from + band : end;
      int pixel = 0;
      for (int i = 0; i < cut.tiles; ++i) {
        const int width = cut.size + (i < cut.larger ? 1 : 0);
        for (int j = 0; j < count; j += most) {
          const int many = count - j < most ? count - j : most;
          // The first tile that uses these weights fetches the next ones, which may lie anywhere.
          const int far = j + most < count ? j + most : conv.turns * count;
          bool fetch = from == row && i == 0 && far > j && far + many <= listed;
          for (int y = from; y + R <= to; y += R, fetch = false) {
            kTiles[width - 1][many - 1][fetch](conv, x, channels + j, channels + far, y, pixel,
                                               planes + j / Numbers::kPaired * conv.plane);
          }
        }
        pixel += width;
      }
    }
  }

  static void run(const Conv& conv, const Element* x, const int32_t* channels, int count, int listed, int row, int end,
                  Element* planes) {
    constexpr int kNarrow = L == 16 ? 4 : 2;  // images this narrow fill a tile with two rows
    int paired = row;
    if (conv.size.OW <= kNarrow) {
      paired = row + (end - row) / 2 * 2;
      walk<2, kNarrow>(conv, x, channels, count, listed, row, paired, planes);
    }
    if (paired < end) walk<1, kMostPixels>(conv, x, channels, count, listed, paired, end, planes);
  }
};

}  // namespace gatedkernels
