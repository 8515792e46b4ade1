// The in-gated kernel: lanes run along the output channels and every input value is broadcast, so an active input
// channel is nothing but a pointer to its values and one to its weights.
// A tile is R rows of P pixels times two vectors of output channels.
#pragma once

#include <type_traits>

#include "cpu/bring.h"
#include "cpu/numbers.h"
#include "cpu/rows.h"

namespace gatedkernels {

template <class Numbers>
struct InRows {
  using Element = typename Numbers::Element;
  using Operand = typename Numbers::Operand;
  using Conv = InConvOf<Element>;
  static constexpr int L = Numbers::kLanes;
  static constexpr int kPaired = Numbers::kPaired;
  static constexpr int kMostPixels = L == 16 ? 9 : 6;
  static constexpr int kMostAlone = L == 16 ? 8 : 6;  // in tiles of one tap, whose registers are scarce
  static constexpr int kVectors = 2;
  static constexpr int kChain = Numbers::kChain;
  static constexpr int kLine = 64 / sizeof(Element);  // of the cache

  template <int R, int P, int V>
  struct Sums {
    Vector<L> at[R][P][V];
  };

  // Where the weights of the input channels lie whose values share a lane.
  using Rows = const Element* const (&)[kPaired];

  // One tap of the window for the pixels [From, To) of the rows that are inside the image; Alone: the only one.
  template <int R, int P, int V, int From, int To, bool Upper, bool Lower, bool Alone = false>
  static GK_INLINE void tap(Sums<R, P, V>& sum, const Element* x, int64_t step, int64_t line, Rows weight,
                            int64_t offset) {
    Operand w[V];
    Numbers::load_weights(weight, offset, w);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) pin(w[v]);
#pragma GCC unroll 2
    for (int i = Upper ? 0 : 1; i < (Lower ? 2 : 1); ++i) {
      const Element* at = x;
#pragma GCC unroll 16
      for (int p = From; p < To; ++p) {
        Operand value;
        if constexpr (Alone && P > 7) {
          // Three to a pointer: else the compiler runs out of registers for their distances.
          if ((p - From) % 3 == 0) {
            at = p == From ? x + i * line + p * step : at + 3 * step;
            asm("" : "+r"(at));
          }
          value = Numbers::spread(at + (p - From) % 3 * step);
        } else {
          value = Numbers::spread(x + i * line + p * step);
        }
        pin(value);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) Numbers::multiply_add(sum.at[i][p][v], value, w[v]);
      }
    }
  }

  template <int S, int R, int P, int V, bool Upper, bool Lower>
  static GK_INLINE void taps(Sums<R, P, V>& sum, const Element* x, int64_t pixel_step, int64_t step, int64_t line,
                             Rows weight, int64_t offset, bool left, bool right) {
    if constexpr (S == 1) {
      tap<R, P, V, 0, P, Upper, Lower, true>(sum, x, step, line, weight, offset);
    } else {
      if (left) {
        tap<R, P, V, 1, P, Upper, Lower>(sum, x, step, line, weight, offset);
      } else {
        tap<R, P, V, 0, P, Upper, Lower>(sum, x, step, line, weight, offset);
      }
      tap<R, P, V, 0, P, Upper, Lower>(sum, x + pixel_step, step, line, weight, offset + kBlock);
      if (right) {
        tap<R, P, V, 0, P - 1, Upper, Lower>(sum, x + 2 * pixel_step, step, line, weight, offset + 2 * kBlock);
      } else {
        tap<R, P, V, 0, P, Upper, Lower>(sum, x + 2 * pixel_step, step, line, weight, offset + 2 * kBlock);
      }
    }
  }

  // Weights to bring nearer meanwhile: those of the listed channels [from, to), `distance` elements on.
  struct Ahead {
    int64_t distance = 0;
    int from = 0, to = 0;
  };

  // Unit: neighbouring output pixels read neighbouring values, or pairs of them.
  template <int S, bool Unit, int R, int P, int V>
  static void tile(const Conv& conv, const Element* x, const int32_t* channels, int count, int lane, int row, int pixel,
                   Ahead ahead, bool cold, const Element* residual, Element* y) {
    const Geometry& g = conv.size;
    constexpr int kRow = S * S * kBlock;
    constexpr int kSoon = S == 1 ? 48 : 6;  // gathered rows start a new stream each: fetch this many ahead
    const Element* weight = conv.weight + int64_t{lane / kBlock - conv.first} * conv.C * kRow + lane % kBlock;
    const int64_t pixel_step = Unit ? kPaired : conv.pixel_step, line = conv.row_step;
    const int64_t step = Unit ? kPaired : pixel_step * g.stride;
    const Element* corner = x + input_row(g, row, 0) * line + (int64_t{pixel} * g.stride - S / 2) * pixel_step;
    const bool left = reads_left(g, pixel), right = reads_right(g, pixel + P - 1);
    const int valid = conv.K - lane;  // output channels from here on

    // What the end of the tile reads and writes is fetched now, behind the arithmetic.
    for (int i = 0; i < R; ++i) {
      const int64_t at = (int64_t{row + i} * g.OW + pixel) * conv.K + lane;
      for (int p = 0; p < P; ++p) {
        for (int cache_line = 0; cache_line < V * L; cache_line += kLine) {
          __builtin_prefetch(y + at + p * conv.K + cache_line, 1);
          if (residual) __builtin_prefetch(residual + at + p * conv.K + cache_line);
        }
      }
    }

    Vector<L> bias[V] = {};
    if (conv.bias) Numbers::load_pixel(conv.bias + lane - conv.first * kBlock, valid, bias);
    Sums<R, P, V> sum;
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum.at[i][p][v] = bias[v];
      }
    }

    bool upper[S], lower[S];
    for (int r = 0; r < S; ++r) {
      upper[r] = inside(g, input_row(g, row, r));
      lower[r] = R == 2 && inside(g, input_row(g, row + 1, r));
    }
    static constexpr Element kZeros[kRow] = {};
    const bool fetches = cold || ahead.from < ahead.to;
    const auto multiply = [&](int j, auto fetching) __attribute__((always_inline)) {
      const int channel = channels ? channels[j] : j;
      const Element* in = corner + (conv.gathered ? channel : j / kPaired) * conv.channel_step;
      const Element* rows[kPaired];
      rows[0] = weight + channel * int64_t{kRow};
      if constexpr (kPaired == 2) {
        rows[1] = j + 1 < count ? weight + (channels ? channels[j + 1] : j + 1) * int64_t{kRow} : kZeros;
      }
      if (fetching && cold) {
#pragma GCC unroll 2
        for (int i = 0; i < kPaired; ++i) {
          const int soon = j + i + kSoon < count ? j + i + kSoon : count - 1;
          const Element* next = weight + (channels ? channels[soon] : soon) * int64_t{kRow};
          bring(next, kRow);
        }
      }
      if (fetching && j >= ahead.from && j < ahead.to) {
#pragma GCC unroll 2
        for (int i = 0; i < kPaired; ++i) bring(rows[i] + ahead.distance, kRow);
      }
      int64_t offset = 0;
      for (int r = 0; r < S; ++r, in += line, offset += S * kBlock) {
        if constexpr (R == 1) {
          if (upper[r]) taps<S, R, P, V, true, false>(sum, in, pixel_step, step, line, rows, offset, left, right);
        } else if (upper[r] && lower[r]) {
          taps<S, R, P, V, true, true>(sum, in, pixel_step, step, line * g.stride, rows, offset, left, right);
        } else if (upper[r]) {
          taps<S, R, P, V, true, false>(sum, in, pixel_step, step, line * g.stride, rows, offset, left, right);
        } else if (lower[r]) {
          taps<S, R, P, V, false, true>(sum, in, pixel_step, step, line * g.stride, rows, offset, left, right);
        }
      }
    };
    // One long chain of additions would lose digits: sums of some channels are added to the total at a time. It stays
    // in memory: the registers are for the sums and what they are made of.
    Sums<R, P, V> total;
    asm("" : "=m"(total));
    for (int from = 0; from < count; from += kChain) {
      asm("" : "+m"(total));
      const int to = count - from > kChain ? from + kChain : count;
      // Where little is multiplied for each channel, it counts what else is done for it.
      if (S == 1 && !fetches) {
        for (int j = from; j < to; j += kPaired) multiply(j, std::false_type());
      } else {
        for (int j = from; j < to; j += kPaired) multiply(j, std::true_type());
      }
      if (count > kChain) {
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
              if (from) sum.at[i][p][v] += total.at[i][p][v];
              total.at[i][p][v] = sum.at[i][p][v];
              if (to < count) sum.at[i][p][v] = Vector<L>{};
            }
          }
        }
      }
    }

#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const int64_t at = (int64_t{row + i} * g.OW + pixel + p) * conv.K + lane;
        Vector<L> skip[V] = {};
        if (residual) Numbers::load_pixel(residual + at, valid, skip);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          skip[v] += sum.at[i][p][v];
          if (conv.relu) skip[v] = Numbers::relu(skip[v]);
        }
        Numbers::store_pixel(y + at, valid, skip);
      }
    }
  }

  using Tile = void (*)(const Conv&, const Element*, const int32_t*, int, int, int, int, Ahead, bool, const Element*,
                        Element*);

  template <int S, bool Unit, int R, int Most, int V>
  static constexpr std::array<Tile, Most> table() {
    return []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<Tile, Most>{tile<S, Unit, R, P + 1, V>...};
    }(std::make_integer_sequence<int, Most>{});
  }

  template <int S, bool Unit, int R, int Most>
  static void walk(const Conv& conv, const Element* x, const int32_t* channels, int count, int block, int last,
                   int row, int end, const Element* residual, Element* y) {
    static constexpr auto kTiles = table<S, Unit, R, Most, kVectors>();
    // Where a vector is half a block, and the last one is alone in it.
    constexpr bool kHalves = S == 3 && L == 16 && kPaired == 1;
    static constexpr auto kHalfTiles = table<S, Unit, R, Most, kHalves ? 1 : kVectors>();
    const RowCut cut(conv.size.OW, (conv.size.OW + Most - 1) / Most);
    const int lanes = last * kBlock < conv.K ? last * kBlock : conv.K;
    const int blocks = (conv.K + kBlock - 1) / kBlock;
    const int further = conv.turns * (last - block);
    const int all = (end - row) / R * cut.tiles;
    bool cold = true;
    for (int oy = row, done = 0; oy + R <= end; oy += R) {
      int pixel = 0;
      for (int i = 0; i < cut.tiles; ++i, ++done) {
        const int width = cut.size + (i < cut.larger ? 1 : 0);
        // Each tile fetches a share of the weights that will probably be next, so that memory keeps up with arithmetic.
        Ahead ahead;
        if (further > 0 && block + further < blocks) {
          ahead = {int64_t{further} * conv.C * S * S * kBlock, count * done / all, count * (done + 1) / all};
        }
        for (int lane = block * kBlock; lane < lanes; lane += kVectors * L) {
          const bool half = kHalves && lanes - lane <= L;
          (half ? kHalfTiles : kTiles)[width - 1](conv, x, channels, count, lane, oy, pixel, ahead, cold, residual, y);
        }
        pixel += width;
        cold = false;
      }
    }
  }

  template <int S, bool Unit>
  static void rows(const Conv& conv, const Element* x, const int32_t* channels, int count, int block, int last, int row,
                   int end, const Element* residual, Element* y) {
    constexpr int kNarrow = L == 16 ? 6 : 3;  // images this narrow fill a tile with two rows
    int paired = row;
    if (conv.size.OW <= kNarrow) {
      paired = row + (end - row) / 2 * 2;
      walk<S, Unit, 2, kNarrow>(conv, x, channels, count, block, last, row, paired, residual, y);
    }
    if (paired < end) {
      constexpr int kMost = S == 1 ? kMostAlone : kMostPixels;
      walk<S, Unit, 1, kMost>(conv, x, channels, count, block, last, paired, end, residual, y);
    }
  }

  static void run(const Conv& conv, const Element* x, const int32_t* channels, int count, int block, int last, int row,
                  int end, const Element* residual, Element* y) {
    const bool unit = conv.pixel_step == kPaired && conv.size.stride == 1;
    auto* chosen = conv.size.S == 1 ? rows<1, false> : unit ? rows<3, true> : rows<3, false>;
    chosen(conv, x, channels, count, block, last, row, end, residual, y);
  }
};

}  // namespace gatedkernels
