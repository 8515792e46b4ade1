// Columns of packed filters: for listed input channels, the weights of listed output channels side by side, in the
// layout that the in-gated kernel reads. An input channel costs nothing but a pointer; output channels are lanes, and
// have to be moved: every vector of the result is put together from those that hold its channels, all taps of a window
// at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace gatedkernels {

template <int L>
struct ColumnLanes {
  typedef int32_t type __attribute__((vector_size(L * sizeof(int32_t))));
};

template <int L>
struct Columns {
  using Lanes = typename ColumnLanes<L>::type;
  static constexpr int kTaps = 9;
  static constexpr int kVectors = kBlock / L;

  // What one vector of the filters gives to one of the result.
  struct Source {
    int64_t offset;  // from the first block's row of an input channel
    Lanes from, taken;
  };

  // The sources of a vector: of at most L, one for each of its lanes.
  struct Sources {
    int count = 0;
    Source at[L];
  };

  static Sources sources_of(int64_t block, const int32_t* outputs, int count) {
    Sources all;
    for (int lane = 0; lane < count; ++lane) {
      const int32_t channel = outputs[lane];
      const int64_t offset = channel / kBlock * block + channel % kBlock / L * L;
      if (!all.count || all.at[all.count - 1].offset != offset) all.at[all.count++] = {offset, Lanes{}, Lanes{}};
      Source& last = all.at[all.count - 1];
      last.from[lane] = channel % L;
      last.taken[lane] = -1;
    }
    return all;
  }

  // `outputs`: at most kBlock ascending channels; lanes behind the last one become zeros.
  static void gather(const float* weight, int64_t C, const int32_t* inputs, int count, const int32_t* outputs, int many,
                     float* to) {
    constexpr int kRow = kTaps * kBlock, kSoon = 3;  // rows ahead that are fetched
    Sources sources[kVectors];
    for (int v = 0; v < kVectors && v * L < many; ++v) {
      sources[v] = sources_of(C * kRow, outputs + v * L, many - v * L < L ? many - v * L : L);
    }
    for (int j = 0; j < count; ++j, to += kRow) {
      const int soon = j + kSoon < count ? j + kSoon : count - 1;
      const float* row = weight + (inputs ? inputs[j] : j) * int64_t{kRow};
      const float* next = weight + (inputs ? inputs[soon] : soon) * int64_t{kRow};
      for (int v = 0; v < kVectors; ++v) {
        Vector<L> taps[kTaps] = {};
        for (int s = 0; s < sources[v].count; ++s) {
          const Source& source = sources[v].at[s];
          const Lanes from = source.from, taken = source.taken;
#pragma GCC unroll 9
          for (int t = 0; t < kTaps; ++t) {
            __builtin_prefetch(next + source.offset + t * kBlock, 0, 2);
            taps[t] = taken ? __builtin_shuffle(load<L>(row + source.offset + t * kBlock), from) : taps[t];
          }
        }
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t) store<L>(to + t * kBlock + v * L, taps[t]);
      }
    }
  }
};

}  // namespace gatedkernels
