// The kernels for processors with AVX512.
#if defined(__x86_64__)

// Before the instruction set is raised, so that no shared inline function is compiled with it.
#include <array>
#include <cstdint>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

#include "cpu/gate_rows.h"
#include "cpu/in_rows.h"
#include "cpu/linear_rows.h"
#include "cpu/out_rows.h"

namespace gatedkernels {

const Kernels kAvx512Kernels = {
    "avx512",
    OutRows<16>::run,
    InRows<16>::run,
    GateRows<16>::add_pixels,
    GateRows<16>::linear,
    LinearRows<16>::panel,
    LinearRows<16>::gather_rows,
    LinearRows<16>::spread,
};

}  // namespace gatedkernels

#endif
