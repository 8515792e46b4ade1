// Vectors of float lanes, in the compiler's own vector types: one source for AVX-512 (16 lanes), AVX2 (8) and SSE2 (4).
// A file that includes this chooses its instruction set before it does (isa_*.cpp).
#pragma once

#include <cstdint>
#include <utility>

namespace gatedkernels {

template <int L>
struct VectorOf {
  typedef float type __attribute__((vector_size(L * sizeof(float))));
};

template <int L>
using Vector = typename VectorOf<L>::type;
using Quad = Vector<4>;

#define GK_INLINE inline __attribute__((always_inline))

template <int L>
GK_INLINE Vector<L> load(const float* from) {
  Vector<L> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <int L>
struct BitsOf {
  typedef uint16_t narrow __attribute__((vector_size(L * sizeof(uint16_t))));
  typedef uint32_t wide __attribute__((vector_size(L * sizeof(uint32_t))));
};

// The same from bfloat16, whose bits are the upper half of a float's.
template <int L>
GK_INLINE Vector<L> load_wide(const uint16_t* from) {
  typename BitsOf<L>::narrow v;
  __builtin_memcpy(&v, from, sizeof v);
  return (Vector<L>)(__builtin_convertvector(v, typename BitsOf<L>::wide) << 16);
}

// Out of line: the ends of rows are rare, and a copy in every tile would double the code. Static: each instruction set
// has its own.
template <int L>
static __attribute__((noinline)) Vector<L> load_first(const float* from, int count) {
  Vector<L> v = {};
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <int L>
GK_INLINE void store(float* to, Vector<L> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <int L>
static __attribute__((noinline)) void store_first(float* to, Vector<L> v, int count) {
  for (int i = 0; i < count; ++i) to[i] = v[i];
}

template <int L>
GK_INLINE Vector<L> broadcast(float value) {
  return value - Vector<L>{};  // folds into a broadcast, which 0 + value does not: -0 would change
}

// Holds a value in a register. Without it the compiler folds the load into every multiplication that uses the value,
// and the loop is bound by loads.
template <class V>
GK_INLINE void pin(V& v) {
#if defined(__x86_64__)
  if constexpr (sizeof v == 64) {
    asm("" : "+v"(v));
  } else if constexpr (sizeof(V) >= 16) {
    asm("" : "+x"(v));
  }
#endif
}

template <int L>
GK_INLINE Vector<L> relu(Vector<L> v) {
  return v < 0.0f ? Vector<L>{} : v;  // a NaN stays one
}

// (a0, b0, a1, b1, …) is 2 L lanes long: its lower and its upper half; evens and odds undo it.
template <int L>
GK_INLINE Vector<L> lower_interleaved(Vector<L> a, Vector<L> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (I / 2 + I % 2 * L)...);
  }(std::make_integer_sequence<int, L>{});
}

template <int L>
GK_INLINE Vector<L> upper_interleaved(Vector<L> a, Vector<L> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, ((I + L) / 2 + (I + L) % 2 * L)...);
  }(std::make_integer_sequence<int, L>{});
}

template <int L>
GK_INLINE Vector<L> evens(Vector<L> a, Vector<L> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (2 * I)...);
  }(std::make_integer_sequence<int, L>{});
}

template <int L>
GK_INLINE Vector<L> odds(Vector<L> a, Vector<L> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (2 * I + 1)...);
  }(std::make_integer_sequence<int, L>{});
}

// The sums over the lanes of four vectors.
template <int L>
GK_INLINE Quad sums(Vector<L> a, Vector<L> b, Vector<L> c, Vector<L> d) {
  using Lanes = std::make_integer_sequence<int, L>;
  // Adds the lanes of two vectors pairwise within every 128 bits: (a0+a2, b0+b2, a1+a3, b1+b3).
  auto singles = []<int... I>(Vector<L> u, Vector<L> v, std::integer_sequence<int, I...>)
      __attribute__((always_inline)) {
    return __builtin_shufflevector(u, v, (I / 4 * 4 + I % 4 / 2 + (I % 2 ? L : 0))...) +
           __builtin_shufflevector(u, v, (I / 4 * 4 + 2 + I % 4 / 2 + (I % 2 ? L : 0))...);
  };
  auto pairs = []<int... I>(Vector<L> u, Vector<L> v, std::integer_sequence<int, I...>)
      __attribute__((always_inline)) {
    return __builtin_shufflevector(u, v, (I / 4 * 4 + I % 2 + (I % 4 / 2 ? L : 0))...) +
           __builtin_shufflevector(u, v, (I / 4 * 4 + 2 + I % 2 + (I % 4 / 2 ? L : 0))...);
  };
  const Vector<L> t = pairs(singles(a, b, Lanes{}), singles(c, d, Lanes{}), Lanes{});
  if constexpr (L == 4) {
    return t;
  } else if constexpr (L == 8) {
    return __builtin_shufflevector(t, t, 0, 1, 2, 3) + __builtin_shufflevector(t, t, 4, 5, 6, 7);
  } else {
    const Vector<8> h = __builtin_shufflevector(t, t, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(t, t, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  }
}

}  // namespace gatedkernels
