// bfloat16 in memory, products of pairs added in float32: AVX512-BF16, so isa_avx512bf16.cpp alone includes this.
//
// Where 32 values widen to two vectors of float32, the first holds values 0-3, 8-11, 16-19 and 24-27 and the second the
// others: interleaving within 128 bits is one instruction, and nothing in between depends on the order.
#pragma once

#include <immintrin.h>

#include "cpu/kernels_bf16.h"
#include "cpu/vector.h"

namespace gatedkernels {

struct BFloat16 {
  using Element = Bf16;
  using Operand = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kPaired = 2;
  static constexpr int kChain = 1 << 30;  // what a long chain loses is far below what the result is rounded to

  static GK_INLINE Operand load(const Bf16* from) { return _mm512_loadu_si512(from); }
  static GK_INLINE Operand load_first(const Bf16* from, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, from);
  }
  static GK_INLINE void multiply_add(Vector<16>& sum, Operand a, Operand b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // The same pair of values in every lane.
  static GK_INLINE Operand spread(const Bf16* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
  }

  // The same value, paired with zero, in every lane; nothing beyond it is read.
  static GK_INLINE Operand spread_one(const Bf16* from) { return _mm512_set1_epi32(from->bits); }

  // Two vectors of weights, a pair for each output channel, of two input channels.
  static GK_INLINE void load_weights(const Bf16* const (&row)[2], int64_t offset, Operand (&w)[2]) {
    const __m512i even = load(row[0] + offset), odd = load(row[1] + offset);
    w[0] = _mm512_unpacklo_epi16(even, odd);
    w[1] = _mm512_unpackhi_epi16(even, odd);
  }

  // `count` adjacent values, in the lanes of multiply_add's sums; zeros in the lanes behind them.
  static GK_INLINE void load_pixel(const Bf16* from, int count, Vector<16> (&v)[2]) {
    const __m512i narrow = count >= 32 ? load(from) : load_first(from, count);
    v[0] = (Vector<16>)_mm512_unpacklo_epi16(__m512i{}, narrow);
    v[1] = (Vector<16>)_mm512_unpackhi_epi16(__m512i{}, narrow);
  }

  static GK_INLINE void store_pixel(Bf16* to, int count, const Vector<16> (&v)[2]) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
    const __m512i narrow = __builtin_shufflevector(halves, halves, 0, 4, 1, 5, 2, 6, 3, 7);
    if (count >= 32) {
      _mm512_storeu_si512(to, narrow);
    } else {
      _mm512_mask_storeu_epi16(to, (1u << count) - 1, narrow);
    }
  }

  // A NaN stays one.
  static GK_INLINE Vector<16> relu(Vector<16> v) { return _mm512_maskz_max_ps(0xffff, Vector<16>{}, v); }

  // The end of a row of P pixels of T output channels: sums over the lanes, at `at` in the planes of each pair.
  template <int P, int T>
  static GK_INLINE void store_planes(const Vector<16> (&sum)[P][T], const OutConvOf<Bf16>& conv,
                                     const int32_t* channels, Bf16* planes, int64_t at) {
#pragma GCC unroll 2
    for (int t = 0; t < T; t += 2) {
      Bf16* to = planes + t / 2 * conv.plane + 2 * at;
      float even = 0, odd = 0;
      if (conv.bias) {
        even = widened(conv.bias[channels[t]]);
        if (t + 1 < T) odd = widened(conv.bias[channels[t + 1]]);
      }
      const Vector<8> bias = {even, odd, even, odd, even, odd, even, odd};
      auto halved = [&](int p, int i) __attribute__((always_inline)) {
        if (t + i >= T) return Vector<8>{};
        const Vector<16> v = sum[p < P ? p : P - 1][t + i < T ? t + i : t];
        return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
      };
#pragma GCC unroll 3
      for (int q = 0; q < P; q += 4) {
        // Four pixels at a time; the last four overlap with those before them rather than end in a partial store.
        const int p = q + 4 <= P ? q : P > 4 ? P - 4 : 0;
        const Vector<8> front = quarters(halved(p, 0), halved(p, 1), halved(p + 1, 0), halved(p + 1, 1));
        const Vector<8> back = quarters(halved(p + 2, 0), halved(p + 2, 1), halved(p + 3, 0), halved(p + 3, 1));
        Vector<8> y = __builtin_shufflevector(front, back, 0, 1, 2, 3, 8, 9, 10, 11) +
                      __builtin_shufflevector(front, back, 4, 5, 6, 7, 12, 13, 14, 15) + bias;
        if (conv.relu) y = _mm256_max_ps(Vector<8>{}, y);
        const __m128i narrow = (__m128i)_mm256_cvtneps_pbh(y);
        __builtin_memcpy(to + 2 * p, &narrow, (P < 4 ? P : 4) * 2 * sizeof(Bf16));
      }
    }
  }

  // sum[c] += x[p][c] over pixels of C adjacent channels, `step` values apart.
  static void add_pixels(const Bf16* x, int64_t pixels, int64_t step, int64_t C, float* sum) {
    for (int64_t c = 0; c < C; c += 32) {
      const int count = static_cast<int>(C - c < 32 ? C - c : 32);
      Vector<16> s[2] = {}, v[2];
      for (int64_t p = 0; p < pixels; ++p) {
        load_pixel(x + p * step + c, count, v);
        s[0] += v[0];
        s[1] += v[1];
      }
      for (int i = 0; i < count; ++i) sum[c + i] += s[i / 4 % 2][i / 8 * 4 + i % 4];
    }
  }

  // y[c] = the largest of some pixels' c; a NaN is the largest.
  static void max_pixels(const Bf16* const* pixels, int count, int64_t C, Bf16* y) {
    for (int64_t c = 0; c < C; c += 32) {
      const int many = static_cast<int>(C - c < 32 ? C - c : 32);
      Vector<16> most[2], v[2];
      load_pixel(pixels[0] + c, many, most);
      for (int p = 1; p < count; ++p) {
        load_pixel(pixels[p] + c, many, v);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) most[i] = ((v[i] > most[i]) | (v[i] != v[i])) ? v[i] : most[i];
      }
      store_pixel(y + c, many, most);
    }
  }

  static GK_INLINE float widened(Bf16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
  }

 private:
  // The sums over each half of four vectors: those of the lower halves, then those of the upper ones.
  static GK_INLINE Vector<8> quarters(Vector<8> a, Vector<8> b, Vector<8> c, Vector<8> d) {
    const Vector<8> ab = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                         __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    const Vector<8> cd = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13) +
                         __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  }
};

}  // namespace gatedkernels
