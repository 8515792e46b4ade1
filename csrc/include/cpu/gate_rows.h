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

  // y[n] = weight (K, C) times x[n], plus bias, for some samples, which follow each other; weights may be the bits of
  // bfloat16. Four samples share each row: it comes from no nearer than the second-level cache.
  template <class Weight>
  static void linear(const Weight* weight, const float* bias, const float* x, int64_t samples, int64_t C, int64_t K,
                     float* y) {
    for (; samples >= 4; samples -= 4, x += 4 * C, y += 4 * K) linear_some<4>(weight, bias, x, C, K, y);
    for (; samples > 0; --samples, x += C, y += K) linear_some<1>(weight, bias, x, C, K, y);
  }

 private:
  template <int N, class Weight>
  static void linear_some(const Weight* weight, const float* bias, const float* x, int64_t C, int64_t K, float* y) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      const Weight* w = weight + k * C;
      Vector<L> s[N][4] = {};
      int64_t c = 0;
      for (; c + L <= C; c += L) {
        Vector<L> rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) rows[i] = vector(w + i * C + c);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          const Vector<L> v = load<L>(x + n * C + c);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) s[n][i] += v * rows[i];
        }
      }
      for (int n = 0; n < N; ++n) {
        Quad sum = sums<L>(s[n][0], s[n][1], s[n][2], s[n][3]);
        for (int64_t rest = c; rest < C; ++rest) {
          for (int i = 0; i < 4; ++i) sum[i] += x[n * C + rest] * number(w + i * C + rest);
        }
        store<4>(y + n * K + k, sum + load<4>(bias + k));
      }
    }
    for (; k < K; ++k) {
      for (int n = 0; n < N; ++n) {
        float sum = bias[k];
        for (int64_t c = 0; c < C; ++c) sum += x[n * C + c] * number(weight + k * C + c);
        y[n * K + k] = sum;
      }
    }
  }

  static GK_INLINE Vector<L> vector(const float* from) { return load<L>(from); }
  static GK_INLINE Vector<L> vector(const uint16_t* from) { return load_wide<L>(from); }

  static GK_INLINE float number(const float* from) { return *from; }
  static GK_INLINE float number(const uint16_t* from) {
    const uint32_t bits = uint32_t{*from} << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};

}  // namespace gatedkernels
