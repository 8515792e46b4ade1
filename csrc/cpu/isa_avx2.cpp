// The kernels for processors with AVX2.
#if defined(__x86_64__)

// Before the instruction set is raised, so that no shared inline function is compiled with it.
#include <array>
#include <cstdint>
#include <utility>

#pragma GCC target("avx2,fma")

#include "cpu/kernel_table.h"

namespace gatedkernels {

const Kernels kAvx2Kernels = kernels_of<8>("avx2");

}  // namespace gatedkernels

#endif
