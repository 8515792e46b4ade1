// The out-gated kernel: lanes run along the input channels, so an active output channel is nothing but a pointer.
// A tile is R rows of P pixels times T output channels, all partial sums over the lanes in registers.
#pragma once

#include "cpu/bring.h"
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
  static constexpr int kNarrow = L == 16 ? 4 : 2;  // images this narrow fill a tile with two rows
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
  template <int R, int P, int T, int From, int To, bool Upper, bool Lower>
  static GK_INLINE void tap(Sums<R, P, T>& sum, const Conv& conv, const Element* x, int64_t step, int64_t line,
                            const Element* const* weight, int64_t offset) {
    const Element* ws[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) ws[t] = weight[t] + offset;
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
    for (; c + kStep <= conv.inputs; c += kStep) {
      accumulate([c](const Element* from) __attribute__((always_inline)) { return Numbers::load(from + c); });
    }
    if (c < conv.inputs) {
      const int rest = conv.inputs - c;
      accumulate([c, rest](const Element* from) __attribute__((always_inline)) {
        return Numbers::load_first(from + c, rest);
      });
    }
  }

  template <int R, int P, int T, bool Upper, bool Lower>
  static GK_INLINE void taps(Sums<R, P, T>& sum, const Conv& conv, const Element* x, int64_t step, int64_t line,
                             const Element* const* weight, int64_t offset, bool left, bool right) {
    const int S = conv.size.S;
    for (int s = 0; s < S; ++s, x += conv.C, offset += conv.C) {
      if (left && s == 0) {
        tap<R, P, T, 1, P, Upper, Lower>(sum, conv, x, step, line, weight, offset);
      } else if (right && s == S - 1) {
        tap<R, P, T, 0, P - 1, Upper, Lower>(sum, conv, x, step, line, weight, offset);
      } else {
        tap<R, P, T, 0, P, Upper, Lower>(sum, conv, x, step, line, weight, offset);
      }
    }
  }

  // What is brought nearer meanwhile: part `part` of `parts` of the weights of as many listed channels.
  struct Ahead {
    const int32_t* channels;
    int part, parts;
  };

  template <int R, int P, int T>
  static void tile(const Conv& conv, const Element* x, const int32_t* channels, const Ahead* ahead, int row, int pixel,
                   Element* planes) {
    const Geometry& g = conv.size;
    const int S = g.S;
    const int64_t filter = int64_t{S} * S * conv.C;
    const int64_t step = int64_t{g.stride} * conv.C, line = int64_t{g.W} * conv.C;
    const bool left = reads_left(g, pixel), right = reads_right(g, pixel + P - 1);
    const Element* weight[T];
    for (int t = 0; t < T; ++t) weight[t] = conv.weight + channels[t] * filter;
    Sums<R, P, T> sum = {};
    for (int r = 0; r < S; ++r) {
      if (ahead) {
        const int64_t share = filter / S, from = share * ahead->part / ahead->parts;
        const int64_t many = share * (ahead->part + 1) / ahead->parts - from;
        for (int t = 0; t < T; ++t) bring(conv.weight + ahead->channels[t] * filter + r * share + from, many);
      }
      const int first = input_row(g, row, r);
      const Element* in = x + first * line + (int64_t{pixel} * g.stride - S / 2) * conv.C;
      const int64_t offset = int64_t{r} * S * conv.C;
      const bool upper = inside(g, first), lower = R == 2 && inside(g, first + g.stride);
      if constexpr (R == 1) {
        if (upper) taps<R, P, T, true, false>(sum, conv, in, step, line, weight, offset, left, right);
      } else if (upper && lower) {
        taps<R, P, T, true, true>(sum, conv, in, step, line * g.stride, weight, offset, left, right);
      } else if (upper) {
        taps<R, P, T, true, false>(sum, conv, in, step, line * g.stride, weight, offset, left, right);
      } else if (lower) {
        taps<R, P, T, false, true>(sum, conv, in, step, line * g.stride, weight, offset, left, right);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
      Numbers::template store_planes<P, T>(sum.at[i], conv, channels, planes, int64_t{row + i} * g.OW + pixel);
    }
  }

  using Tile = void (*)(const Conv&, const Element*, const int32_t*, const Ahead*, int, int, Element*);
  using ByChannels = std::array<Tile, 4>;

  template <int R, int P>
  static constexpr ByChannels by_channels() {
    return []<int... T>(std::integer_sequence<int, T...>) {
      return ByChannels{tile<R, P, T + 1>...};
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
          // The tiles that use these weights first fetch the next ones, which may lie anywhere: each a share, so that
          // memory keeps up with arithmetic.
          const int far = j + most < count ? j + most : conv.turns * count;
          const bool fetch = from == row && i == 0 && far > j && far + many <= listed;
          Ahead ahead{channels + far, 0, (to - from) / R};
          for (int y = from; y + R <= to; y += R, ++ahead.part) {
            kTiles[width - 1][many - 1](conv, x, channels + j, fetch ? &ahead : nullptr, y, pixel,
                                        planes + j / Numbers::kPaired * conv.plane);
          }
        }
        pixel += width;
      }
    }
  }

  // How many channels of rows this wide are computed at a time.
  static int channels_together(int width) {
    return width <= kNarrow ? channels_for(2 * width) : channels_for(best_cut<1, kMostPixels>(width).widest());
  }

  static void run(const Conv& conv, const Element* x, const int32_t* channels, int count, int listed, int row, int end,
                  Element* planes) {
    int paired = row;
    if (conv.size.OW <= kNarrow) {
      paired = row + (end - row) / 2 * 2;
      walk<2, kNarrow>(conv, x, channels, count, listed, row, paired, planes);
    }
    if (paired < end) walk<1, kMostPixels>(conv, x, channels, count, listed, paired, end, planes);
  }
};

}  // namespace gatedkernels
