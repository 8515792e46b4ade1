// What the row kernels compute from: numbers as they lie in memory, and how products of them are added up in float32.
// Float32 for every instruction set here; bfloat16.h has the other one.
//
// kPaired neighbours in memory share a lane, and one multiply_add adds the products of all of them. Planes between the
// two kernels hold that many channels, interleaved; an odd last channel is paired with zeros.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace gatedkernels {

template <int L>
struct Float32 {
  using Element = float;
  using Operand = Vector<L>;
  static constexpr int kLanes = L;
  static constexpr int kPaired = 1;
  static constexpr int kChain = 64;  // input channels whose products are added one after another; more lose digits

  static GK_INLINE Operand load(const float* from) { return gatedkernels::load<L>(from); }
  static GK_INLINE Operand load_first(const float* from, int count) {
    return gatedkernels::load_first<L>(from, count);
  }
  static GK_INLINE void multiply_add(Vector<L>& sum, Operand a, Operand b) { sum += a * b; }

  static GK_INLINE Vector<L> relu(Vector<L> v) { return gatedkernels::relu<L>(v); }

  // The same value in every lane.
  static GK_INLINE Operand spread(const float* from) { return broadcast<L>(*from); }

  static GK_INLINE Operand spread_one(const float* from) { return spread(from); }

  // Vectors of weights, one for each output channel, of one input channel.
  template <int V>
  static GK_INLINE void load_weights(const float* const (&row)[1], int64_t offset, Operand (&w)[V]) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = load(row[0] + offset + v * L);
  }

  // `count` adjacent values, in the lanes of multiply_add's sums; zeros in the lanes behind them.
  template <int V>
  static GK_INLINE void load_pixel(const float* from, int count, Vector<L> (&v)[V]) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i, from += L, count -= L) {
      if (count >= L) {
        v[i] = load(from);
      } else if (count > 0) {
        v[i] = load_first(from, count);
      } else {
        v[i] = Vector<L>{};
      }
    }
  }

  template <int V>
  static GK_INLINE void store_pixel(float* to, int count, const Vector<L> (&v)[V]) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i, to += L, count -= L) {
      if (count >= L) {
        store<L>(to, v[i]);
      } else if (count > 0) {
        store_first<L>(to, v[i], count);
      }
    }
  }

  // The end of a row of P pixels of T output channels: sums over the lanes, at `at` in each channel's plane.
  template <int P, int T>
  static GK_INLINE void store_planes(const Vector<L> (&sum)[P][T], const OutConv& conv, const int32_t* channels,
                                     float* planes, int64_t at) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      float* to = planes + t * conv.plane + at;
#pragma GCC unroll 3
      for (int q = 0; q < P; q += 4) {
        // Four pixels at a time; the last four overlap with those before them rather than end in a partial store.
        const int p = q + 4 <= P ? q : P > 4 ? P - 4 : 0;
        constexpr int last = P - 1;
        Quad y = sums<L>(sum[p][t], sum[p + 1 < P ? p + 1 : last][t], sum[p + 2 < P ? p + 2 : last][t],
                         sum[p + 3 < P ? p + 3 : last][t]);
        if (conv.bias) y += broadcast<4>(conv.bias[channels[t]]);
        if (conv.relu) y = gatedkernels::relu<4>(y);
        if constexpr (P >= 4) {
          store<4>(to + p, y);
        } else {
          store_first<4>(to, y, P);
        }
      }
    }
  }
};

}  // namespace gatedkernels
