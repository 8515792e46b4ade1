// What follows a dense convolution: a residual is added, negative values become zero, closed channels too.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace gatedkernels {

template <int L>
struct FinishRows {
  typedef int32_t Bits __attribute__((vector_size(L * sizeof(int32_t))));

  template <bool kResidual, bool kOpen>
  static void row(const float* x, const float* residual, const int32_t* open, bool relu, int64_t count, float* y) {
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      Vector<L> v = load<L>(x + i);
      if (kResidual) v += load<L>(residual + i);
      if (relu) v = gatedkernels::relu<L>(v);
      if (kOpen) {
        Bits bits;
        __builtin_memcpy(&bits, open + i, sizeof bits);
        v = (Vector<L>)((Bits)v & bits);
      }
      store<L>(y + i, v);
    }
    for (; i < count; ++i) {
      const float v = kResidual ? x[i] + residual[i] : x[i];
      y[i] = (relu && v < 0) || (kOpen && !open[i]) ? 0.0f : v;
    }
  }

  static void run(const float* x, const float* residual, const int32_t* open, bool relu, int64_t count, float* y) {
    const auto of = residual ? (open ? row<true, true> : row<true, false>)
                             : (open ? row<false, true> : row<false, false>);
    of(x, residual, open, relu, count, y);
  }
};

}  // namespace gatedkernels
