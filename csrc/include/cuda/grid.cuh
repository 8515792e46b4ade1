// How many blocks to launch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gatedkernels {

__host__ __device__ inline int64_t DivideUp(int64_t value, int64_t by) { return (value + by - 1) / by; }

// No grid is wider than this; blocks stride over what is left.
inline unsigned CountBlocks(int64_t work_items) {
  return static_cast<unsigned>(std::min<int64_t>(work_items, 2147483647));
}

}  // namespace gatedkernels
