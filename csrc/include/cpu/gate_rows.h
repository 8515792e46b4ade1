// Small steps over pixels of adjacent channels: a gate's sum and its matrix times a vector, the maximum of pooling.
#pragma once

#include "cpu/vector.h"

namespace gatedkernels {

template <int L>
struct GateRows {
  // sum[c] += x[p][c] over `pixels` pixels of C adjacent channels, `step` floats apart.
  static void add_pixels(const float* x, int64_t pixels, int64_t step, int64_t C, float* sum) {
    constexpr int kTogether = 4;
    int64_t c = 0;
    for (; c + kTogether * L <= C; c += kTogether * L) {
      Vector<L> s[kTogether] = {};
      for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) s[i] += load<L>(x + p * step + c + i * L);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) store<L>(sum + c + i * L, load<L>(sum + c + i * L) + s[i]);
    }
    for (; c < C; ++c) {
      for (int64_t p = 0; p < pixels; ++p) sum[c] += x[p * step + c];
    }
  }

  // y[c] = the largest of some pixels' c; a NaN is the largest.
  static void max_pixels(const float* const* pixels, int count, int64_t C, float* y) {
    int64_t c = 0;
    for (; c + L <= C; c += L) {
      Vector<L> most = load<L>(pixels[0] + c);
      for (int p = 1; p < count; ++p) {
        const Vector<L> v = load<L>(pixels[p] + c);
        most = ((v > most) | (v != v)) ? v : most;
      }
      store<L>(y + c, most);
    }
    for (; c < C; ++c) {
      y[c] = pixels[0][c];
      for (int p = 1; p < count; ++p) {
        const float v = pixels[p][c];
        if (v > y[c] || v != v) y[c] = v;
      }
    }
  }

  // y = weight (K, C) times x, plus bias.
  static void linear(const float* weight, const float* bias, const float* x, int64_t C, int64_t K, float* y) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      const float* w = weight + k * C;
      Vector<L> s[4] = {};
      int64_t c = 0;
      for (; c + L <= C; c += L) {
        const Vector<L> v = load<L>(x + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) s[i] += v * load<L>(w + i * C + c);
      }
      Quad sum = sums<L>(s[0], s[1], s[2], s[3]);
      for (; c < C; ++c) {
        for (int i = 0; i < 4; ++i) sum[i] += x[c] * w[i * C + c];
      }
      store<4>(y + k, sum + load<4>(bias + k));
    }
    for (; k < K; ++k) {
      y[k] = bias[k];
      for (int64_t c = 0; c < C; ++c) y[k] += x[c] * weight[k * C + c];
    }
  }
};

}  // namespace gatedkernels
