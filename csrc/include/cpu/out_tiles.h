// The out-gated kernel on Winograd's components: lanes run along the tiles and every weight is broadcast, so an active
// output channel is nothing but a pointer to its row of transformed weights.
// L lanes; a register tile is P vectors of tiles times T output channels.
#pragma once

#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace gatedkernels {

template <int L>
struct OutTiles {
  static constexpr int kMostVectors = L == 16 ? 4 : 3;
  static constexpr int kMostChannels = 9;  // as many pointers as there are registers for

  static constexpr int channels_for(int vectors) {
    const int fit = kAccumulators<L> / vectors;
    return fit < kMostChannels ? fit : kMostChannels;
  }

  static int64_t weight_row(int64_t C) { return 16 * C + 16; }

  // Weights to bring nearer meanwhile: rows, or null, cache line by line from `line` on, one in `every` lines' time.
  struct Ahead {
    const float* const* rows;
    int64_t line;
    int every;
  };

  // products[t][component][lanes].
  template <int M, int P, int T>
  static void multiply(const float* const* weight, Ahead ahead, const float* v, int64_t pitch, int64_t step, int64_t C,
                       float* products, int64_t product_step) {
    constexpr int kLine = 16;  // floats
    int wait = ahead.every;
    const float* w[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) w[t] = weight[t];
    for (int component = 0; component < 16; ++component, v += step) {
      Vector<M> sum[P][T] = {};
      const float* in = v;
      for (int64_t c = 0; c < C; ++c, in += pitch) {
        if (ahead.rows && c % kLine == 0 && --wait == 0) {
          for (int t = 0; t < T; ++t) __builtin_prefetch(ahead.rows[t] + ahead.line * kLine, 0, 2);
          ++ahead.line, wait = ahead.every;
        }
        Vector<M> values[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          values[p] = load<M>(in + p * M);
          if constexpr (T > 1) pin(values[p]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          Vector<M> u = broadcast<M>(w[t][c]);
          if constexpr (P > 1) pin(u);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sum[p][t] += values[p] * u;
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          store<M>(products + (t * 16 + component) * product_step + p * M, sum[p][t]);
        }
        w[t] += C;
      }
    }
  }

  using Multiply = void (*)(const float* const*, Ahead, const float*, int64_t, int64_t, int64_t, float*, int64_t);

  template <int M, int P>
  static constexpr auto by_channels() {
    return []<int... T>(std::integer_sequence<int, T...>) {
      return std::array<Multiply, kMostChannels>{multiply<M, P, T + 1>...};
    }(std::make_integer_sequence<int, channels_for(P)>{});
  }

  // From the products of one output channel to its pixels. `even` and `odd` columns of two rows wait in `lines`.
  static void finish(const OutConv& conv, const TileGrid& grid, Strip strip, const float* products, int64_t step,
                     float bias, float* plane, float* lines) {
    const int tiles = strip.tiles();
    const int64_t line = step;
    for (int at = 0; at < tiles; at += L) {
      Vector<L> m[16], y[4];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) m[i] = load<L>(products + i * step + at);
      Tiles<L>::template pixels<L>(m, y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        y[i] += bias;
        if (conv.relu) y[i] = relu<L>(y[i]);
        store<L>(lines + i * line + at, y[i]);
      }
    }
    const Geometry& g = grid.size;
    for_each_row(grid, strip, [&](int row, int column, int count, int at) {
      for (int r = 0; r < 2 && 2 * row + r < g.OH; ++r) {
        const float *even = lines + 2 * r * line + at, *odd = even + line;
        float* to = plane + int64_t{2 * row + r} * g.OW + 2 * column;
        int whole = count;
        if (2 * (column + count) > g.OW) {
          --whole;
          to[2 * whole] = even[whole];
        }
        cover<L>(whole, [&](int i, auto lanes) __attribute__((always_inline)) {
          constexpr int M = decltype(lanes)::value;
          const Vector<M> a = load<M>(even + i), b = load<M>(odd + i);
          store<M>(to + 2 * i, lower_interleaved<M>(a, b));
          store<M>(to + 2 * i + M, upper_interleaved<M>(a, b));
        });
      }
    });
  }

  // The one pixel of the tile in the corner: the first one of a tile is the sum of nine components.
  static float corner_pixel(const float* weight, const Components& v, int64_t C) {
    Vector<L> sum[3] = {};
    for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        const float *u = weight + (4 * r + s) * C, *in = v.corner(r, s);
        int64_t c = 0;
        for (; c + L <= C; c += L) sum[s] += load<L>(u + c) * load<L>(in + c);
        const int rest = static_cast<int>(C - c);
        if (rest) sum[s] += load_first<L>(u + c, rest) * load_first<L>(in + c, rest);
      }
    }
    const Vector<L> all = sum[0] + sum[1] + sum[2];
    float pixel = 0;
    for (int i = 0; i < L; ++i) pixel += all[i];
    return pixel;
  }

  static_assert(kMostChannels * 16 + 4 <= 148, "tile_scratch counts on it");

  static void run(const OutConv& conv, const TileGrid& grid, Strip strip, const Components& v,
                  const int32_t* channels, int count, int listed, float* planes, float* scratch) {
    static constexpr std::array<std::array<Multiply, kMostChannels>, 4> kWide = [] {
      std::array<std::array<Multiply, kMostChannels>, 4> table{};
      table[0] = by_channels<L, 1>();
      table[1] = by_channels<L, 2>();
      table[2] = by_channels<L, 3>();
      if constexpr (kMostVectors == 4) table[3] = by_channels<L, 4>();
      return table;
    }();
    static constexpr auto kHalf = by_channels<(L > 8 ? 8 : 4), 1>();
    static constexpr auto kQuad = by_channels<4, 1>();

    // The strip's last tiles, if they are few, go into shorter vectors, and a single one of one pixel into none.
    const bool corner = has_lone_corner(grid, strip);
    if (corner) --strip.last;
    const int tiles = strip.tiles(), over = tiles % L;
    const int narrow = over == 0 ? 0 : over <= 4 && L > 4 ? 4 : over <= 8 && L > 8 ? 8 : 0;
    const int vectors = tiles / L + (over && !narrow);
    const int groups = (vectors + kMostVectors - 1) / kMostVectors, passes = groups + (narrow > 0);
    const int widest = groups ? (vectors + groups - 1) / groups : 1;
    const int most = channels_for(widest), parts = (count + most - 1) / most;
    float* const lines = scratch + kMostChannels * 16 * v.pitch;
    for (int part = 0, j = 0; part < parts; ++part) {
      const int many = (count - j + parts - part - 1) / (parts - part);
      const float *weight[kMostChannels], *ahead[kMostChannels];
      for (int t = 0; t < many; ++t) weight[t] = conv.weight + channels[j + t] * weight_row(conv.C);
      const int far = j + many < count ? j + many : conv.turns * count;
      const float* const* next = far > j && far + many <= listed ? ahead : nullptr;
      for (int t = 0; next && t < many; ++t) ahead[t] = conv.weight + channels[far + t] * weight_row(conv.C);
      int done = 0;
      for (int pass = 0; pass < passes; ++pass) {
        const bool is_narrow = pass == groups;
        const int wide = is_narrow ? 0 : (vectors - done + groups - pass - 1) / (groups - pass);
        const Multiply run_pass = is_narrow ? (narrow == 8 ? kHalf : kQuad)[many - 1] : kWide[wide - 1][many - 1];
        run_pass(weight, {next, conv.C * pass / passes, passes}, v.data + done * L, v.pitch, v.step, conv.C,
                 scratch + done * L, v.pitch);
        done += wide;
      }
      for (int t = 0; t < many; ++t) {
        const float bias = conv.bias ? conv.bias[channels[j + t]] : 0.0f;
        float* const plane = planes + (j + t) * conv.plane;
        finish(conv, grid, strip, scratch + t * 16 * v.pitch, v.pitch, bias, plane, lines);
        if (corner) {
          const float pixel = corner_pixel(weight[t], v, conv.C) + bias;
          plane[int64_t{grid.size.OH} * grid.size.OW - 1] = conv.relu && pixel < 0 ? 0 : pixel;
        }
      }
      j += many;
    }
  }
};

}  // namespace gatedkernels
