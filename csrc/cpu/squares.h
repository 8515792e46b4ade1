// Transpositions in registers, in a form that every instruction set has.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace gatedkernels {

// to[c][r] = from[r][c] for a square of four. Rows of `to` may run backwards: steps are signed.
GK_INLINE void transpose_square(const float* from, int64_t from_step, float* to, int64_t to_step) {
  const Quad a = load<4>(from), b = load<4>(from + from_step);
  const Quad c = load<4>(from + 2 * from_step), d = load<4>(from + 3 * from_step);
  const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<4>(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store<4>(to + to_step, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store<4>(to + 2 * to_step, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
  store<4>(to + 3 * to_step, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

}  // namespace gatedkernels
