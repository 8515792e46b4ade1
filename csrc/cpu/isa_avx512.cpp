// The kernels for processors with AVX512.
#if defined(__x86_64__)

// Before the instruction set is raised, so that no shared inline function is compiled with it.
#include <array>
#include <cstdint>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

#include "cpu/kernel_table.h"

namespace gatedkernels {

const Kernels kAvx512Kernels = kernels_of<16>("avx512");

}  // namespace gatedkernels

#endif
