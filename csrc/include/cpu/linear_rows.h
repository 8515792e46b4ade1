// The linear kernel: lanes run along the units of a panel and every input value is broadcast, so a closed input is one
// that is not listed. Open units are gathered into panels before, and spread over the output after.
// L lanes; a tile is P tokens times V vectors of units.
#pragma once

#include "cpu/rows.h"

namespace gatedkernels {

template <int L>
struct LinearRows {
  static constexpr int kVectors = 2;
  static constexpr int kMostTokens = kAccumulators<L> / kVectors;
  static constexpr int kInputs = 4 * kChain;  // whose products are added one after another

  typedef int32_t Indices __attribute__((vector_size(L * sizeof(int32_t))));

  template <int P, int V>
  static void tile(const LinearPanel& job, int token, int lane, int from, int to) {
    const float* x = job.x + token * job.x_step;
    Vector<L> sum[P][V] = {};
    for (int j = from; j < to; ++j) {
      const int input = job.inputs ? job.inputs[j] : j;
      const float* weight = job.weight + int64_t{job.shared ? input : j} * kBlock + lane;
      Vector<L> w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        w[v] = load<L>(weight + v * L);
        pin(w[v]);
      }
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        Vector<L> value = broadcast<L>(x[p * job.x_step + input]);
        pin(value);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[p][v] += value * w[v];
      }
    }
    const bool add = job.add || from > 0;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int at = lane + v * L, rest = job.units - at;
      if (rest <= 0) continue;
      const Vector<L> bias = load<L>(job.bias + at);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        float* y = job.y + (token + p) * job.y_step + at;
        if (rest >= L) {
          store<L>(y, sum[p][v] + (add ? load<L>(y) : bias));
        } else {
          store_first<L>(y, sum[p][v] + (add ? load_first<L>(y, rest) : bias), rest);
        }
      }
    }
  }

  using Tile = void (*)(const LinearPanel&, int, int, int, int);

  template <int V>
  static constexpr std::array<Tile, kMostTokens> table() {
    return []<int... P>(std::integer_sequence<int, P...>) {
      return std::array<Tile, kMostTokens>{tile<P + 1, V>...};
    }(std::make_integer_sequence<int, kMostTokens>{});
  }

  // Part by part, so that a part's weights stay in the caches for all tokens; and one long chain of additions would
  // lose digits. Results are read and written once a part, which costs shorter parts a tenth of their time: rows of
  // outputs lie so far apart that a column of them falls into few sets of the first-level cache.
  static void panel(const LinearPanel& job) {
    static constexpr std::array<std::array<Tile, kMostTokens>, kVectors> kTiles = {table<1>(), table<2>()};
    const RowCut cut(job.tokens, (job.tokens + kMostTokens - 1) / kMostTokens);
    int from = 0;
    do {
      const int to = from + kInputs < job.count ? from + kInputs : job.count;
      int token = 0;
      for (int i = 0; i < cut.tiles; ++i) {
        const int width = cut.size + (i < cut.larger ? 1 : 0);
        for (int lane = 0; lane < job.units; lane += kVectors * L) {
          kTiles[job.units - lane > L][width - 1](job, token, lane, from, to);
        }
        token += width;
      }
      from = to;
    } while (from < job.count);
  }

  // Transposes L rows by L columns in registers: every round interleaves the upper with the lower half of the rows.
  static GK_INLINE void transpose(Vector<L>* v) {
#pragma GCC unroll 4
    for (int round = 1; round < L; round *= 2) {
      Vector<L> next[L];
#pragma GCC unroll 8
      for (int i = 0; i < L / 2; ++i) interleave(v[i], v[i + L / 2], next + 2 * i);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = next[i];
    }
  }

  static GK_INLINE void interleave(Vector<L> a, Vector<L> b, Vector<L>* to) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      to[0] = __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? L : 0))...);
      to[1] = __builtin_shufflevector(a, b, (L / 2 + I / 2 + (I % 2 ? L : 0))...);
    }(std::make_integer_sequence<int, L>{});
  }

  // panel[c][l] = rows[l][c] for kBlock rows.
  static void gather_rows(const float* const* rows, int64_t inputs, float* panel) {
    int64_t c = 0;
    for (; c + L <= inputs; c += L) {
      for (int l = 0; l < kBlock; l += L) {
        Vector<L> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load<L>(rows[l + i] + c);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store<L>(panel + (c + i) * kBlock + l, v[i]);
      }
    }
    for (; c < inputs; ++c) {
      for (int l = 0; l < kBlock; ++l) panel[c * kBlock + l] = rows[l][c];
    }
  }

  static GK_INLINE Vector<L> permute(Vector<L> v, Indices at) {
#if defined(__clang__)
    Vector<L> moved;
    for (int i = 0; i < L; ++i) moved[i] = v[at[i]];
    return moved;
#else
    return __builtin_shuffle(v, at);
#endif
  }

  // One vector of output columns: where its open units lie in a packed row.
  struct Window {
    Indices at, open;
    int64_t column, offset;
  };

  static Window window(const int32_t* units, int count, int64_t column) {
    Window w = {};
    w.column = column;
    int j = 0;
    while (j < count && units[j] < column) ++j;
    w.offset = j;
    for (int i = 0; i < L; ++i) {
      w.at[i] = static_cast<int32_t>(j - w.offset);
      if (j < count && units[j] == column + i) w.open[i] = -1, ++j;
      if (w.at[i] == L) w.at[i] = 0;
    }
    return w;
  }

  static GK_INLINE Vector<L> opened(const Window& w, const float* packed) {
    const Vector<L> v = permute(load<L>(packed + w.offset), w.at);
    return reinterpret_cast<Vector<L>>(reinterpret_cast<Indices>(v) & w.open);
  }

  static void spread(const SpreadUnits& job) {
    constexpr int kTogether = 32;
    Window windows[kTogether];
    const int64_t width = job.to - job.from;
    if (width <= 0) return;
    if (width < L) {
      const Window w = window(job.units, job.count, job.from);
      for (int64_t t = 0; t < job.tokens; ++t) {
        store_first<L>(job.y + t * job.y_step + job.from, opened(w, job.packed + t * job.step),
                       static_cast<int>(width));
      }
      return;
    }
    // The first and the last window overlap with their neighbours, so that all others are aligned as the rows are.
    for (int64_t column = job.from; column < job.to;) {
      int many = 0;
      for (; many < kTogether && column < job.to; ++many) {
        const int64_t at = column + L <= job.to ? column : job.to - L;
        windows[many] = window(job.units, job.count, at);
        column = at + L == job.to ? job.to : (at + L) / L * L;
      }
      for (int64_t t = 0; t < job.tokens; ++t) {
        for (int i = 0; i < many; ++i) {
          const Window& w = windows[i];
          store<L>(job.y + t * job.y_step + w.column, opened(w, job.packed + t * job.step));
        }
      }
    }
  }
};

}  // namespace gatedkernels
