// The in-gated kernel on Winograd's components: lanes run along the output channels and every component is broadcast,
// so an active input channel is nothing but a pointer to its components and one to its row of transformed weights.
// L lanes; a register tile is P tiles times two vectors of output channels.
#pragma once

#include "cpu/bring.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace gatedkernels {

template <int L>
struct InTiles {
  static constexpr int kVectors = 2;
  static constexpr int kMostTiles = kAccumulators<L> / kVectors;
  static constexpr int kSoon = 4;  // channels
  static constexpr int kTogether = 3;  // groups of tiles that walk through the weights side by side
  static_assert(kTogether * kMostTiles <= 36 && kVectors * L <= 32, "tile_scratch counts on it");

  // Weights to bring nearer meanwhile: of the four components at `four`, nothing if it is null, one piece of kBlock
  // floats from `piece` on in `every` steps. Four pieces are the row of a channel.
  struct Ahead {
    const float* four;
    int piece, every;
  };

  // products[component][tile][lane] of four components, whose weights lie at `four`. Listed rows are nothing that a
  // processor foresees: if they are `cold`, they come now.
  template <int P>
  static void multiply(const float* four, Ahead ahead, const float* v, int64_t pitch, int64_t step,
                       const int32_t* channels, int count, bool cold, float* products) {
    int wait = ahead.every;
    for (int component = 0; component < 4; ++component) {
      Vector<L> sum[P][kVectors] = {};
      const float* in = v + component * step;
      const float* const rows = four + component * kBlock;
      for (int j = 0; j < count; ++j, in += pitch) {
        if (component == 0 && cold) {
          const int late = j + kSoon < count ? j + kSoon : count - 1;
          bring(four + row_of(channels, late), kTileRow);
        }
        if (ahead.four && --wait == 0) {
          bring(ahead.four + row_of(channels, ahead.piece / 4) + ahead.piece % 4 * kBlock, kVectors * L);
          ++ahead.piece, wait = ahead.every;
        }
        const float* row = rows + row_of(channels, j);
        Vector<L> w[kVectors];
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) {
          w[i] = load<L>(row + i * L);
          pin(w[i]);
        }
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          Vector<L> value = broadcast<L>(in[p]);
          pin(value);
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; ++i) sum[p][i] += value * w[i];
        }
      }
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) store<L>(products + (component * P + p) * kVectors * L + i * L, sum[p][i]);
      }
    }
  }

  static GK_INLINE int64_t row_of(const int32_t* channels, int j) {
    return (channels ? channels[j] : j) * int64_t{kTileRow};
  }

  using Multiply = void (*)(const float*, Ahead, const float*, int64_t, int64_t, const int32_t*, int, bool, float*);

  // One tile of `valid` output channels from here on: its products become up to four pixels.
  static GK_INLINE void finish(const InConv& conv, const float* products, int64_t step, int rows, int columns,
                               int valid, const float* bias, const float* residual, float* y) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const int rest = valid - i * L;
      if (rest <= 0) return;
      Vector<L> m[16], out[4];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) m[c] = load<L>(products + c * step + i * L);
      Tiles<L>::template pixels<L>(m, out);
      Vector<L> shift = {};
      if (bias) shift = rest >= L ? load<L>(bias + i * L) : load_first<L>(bias + i * L, rest);
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; ++c) {
          const int64_t at = (int64_t{r} * conv.size.OW + c) * conv.K + i * L;
          Vector<L> value = out[2 * r + c] + shift;
          if (residual) value += rest >= L ? load<L>(residual + at) : load_first<L>(residual + at, rest);
          if (conv.relu) value = relu<L>(value);
          if (rest >= L) {
            store<L>(y + at, value);
          } else {
            store_first<L>(y + at, value, rest);
          }
        }
      }
    }
  }

  // Brings nearer what the pixels of some tiles are added to and written to, behind the arithmetic.
  static void fetch(const InConv& conv, const TileGrid& grid, int tile, int count, int lane, const float* residual,
                    const float* y) {
    const Geometry& g = grid.size;
    for (int row = tile / grid.columns, column = tile % grid.columns; count > 0; --count) {
      for (int r = 2 * row; r < 2 * row + 2 && r < g.OH; ++r) {
        for (int c = 2 * column; c < 2 * column + 2 && c < g.OW; ++c) {
          const int64_t pixel = (int64_t{r} * g.OW + c) * conv.K + lane;
          for (int cache_line = 0; cache_line < kVectors * L; cache_line += 16) {
            __builtin_prefetch(y + pixel + cache_line, 1);
            if (residual) __builtin_prefetch(residual + pixel + cache_line);
          }
        }
      }
      if (++column == grid.columns) column = 0, ++row;
    }
  }

  // Tiles of the next of `groups` groups, as even as they come.
  static int tiles_of(int tiles, int groups) { return (tiles + groups - 1) / groups; }

  static void finish_tiles(const InConv& conv, const TileGrid& grid, int tile, int many, int lane,
                           const float* products, const float* residual, float* y) {
    const Geometry& g = grid.size;
    for (int p = 0; p < many; ++p, ++tile) {
      const int row = 2 * (tile / grid.columns), column = 2 * (tile % grid.columns);
      const int64_t pixel = (int64_t{row} * g.OW + column) * conv.K + lane;
      finish(conv, products + p * kVectors * L, int64_t{many} * kVectors * L, row + 1 < g.OH ? 2 : 1,
             column + 1 < g.OW ? 2 : 1, conv.K - lane, conv.bias ? conv.bias + lane : nullptr,
             residual ? residual + pixel : nullptr, y + pixel);
    }
  }

  static void run(const InConv& conv, const TileGrid& grid, Strip strip, const Components& v, const int32_t* channels,
                  int count, int block, int last, const float* residual, float* y, float* scratch) {
    static constexpr auto kMultiply = []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<Multiply, kMostTiles>{multiply<P + 1>...};
    }(std::make_integer_sequence<int, kMostTiles>{});
    const int tiles = strip.tiles(), groups = (tiles + kMostTiles - 1) / kMostTiles;
    const int walks = (groups + kTogether - 1) / kTogether;
    const int end = last * kBlock < conv.K ? last * kBlock : conv.K, blocks = (conv.K + kBlock - 1) / kBlock;
    const int64_t quarter = conv.C * int64_t{kTileRow};
    for (int lane = block * kBlock; lane < end; lane += kVectors * L) {
      const int mine = lane / kBlock, soon = mine + 1 < last ? mine + 1 : mine + 1 + (conv.turns - 1) * (last - block);
      const float* const weight = conv.weight + 4 * mine * quarter + lane % kBlock;
      const bool known = mine + 1 < last || (conv.turns > 0 && soon < blocks);
      for (int walk = 0, group = 0, at = 0; walk < walks; ++walk) {
        // Some groups take four components each in turn, and meanwhile the weights of the next four come nearer, a
        // share with every group, so that memory keeps up with arithmetic. Behind the last four come those of another
        // block.
        const int together = (groups - group + walks - walk - 1) / (walks - walk);
        const int first = at;
        for (int four = 0; four < 4; ++four) {
          const float* const next = four < 3                                 ? weight + (four + 1) * quarter
                                    : known && group + together == groups ? conv.weight + 4 * soon * quarter
                                                                             : nullptr;
          at = first;
          for (int i = 0; i < together; ++i) {
            const int many = tiles_of(tiles - at, groups - group - i);
            if (four == 3) fetch(conv, grid, strip.first + at, many, lane, residual, y);
            kMultiply[many - 1](weight + four * quarter, {next, 4 * count * i / together, together},
                                v.data + 4 * four * v.step + at, v.pitch, v.step, channels, count,
                                walk == 0 && i == 0 && four == 0 && lane == block * kBlock,
                                scratch + (16 * (at - first) + 4 * four * many) * kVectors * L);
            at += many;
          }
        }
        at = first;
        for (int i = 0; i < together; ++i) {
          const int many = tiles_of(tiles - at, groups - group - i);
          finish_tiles(conv, grid, strip.first + at, many, lane, scratch + 16 * (at - first) * kVectors * L, residual,
                       y);
          at += many;
        }
        group += together;
      }
    }
  }
};

}  // namespace gatedkernels
