// The kernels for processors with AVX2.
#if defined(__x86_64__)

// Before the instruction set is raised, so that no shared inline function is compiled with it.
#include <array>
#include <cstdint>
#include <utility>

#pragma GCC target("avx2,fma")

#include "cpu/gate_rows.h"
#include "cpu/in_rows.h"
#include "cpu/linear_rows.h"
#include "cpu/out_rows.h"

namespace gatedkernels {

const Kernels kAvx2Kernels = {
    "avx2",
    OutRows<8>::run,
    InRows<8>::run,
    GateRows<8>::add_pixels,
    GateRows<8>::linear,
    LinearRows<8>::panel,
    LinearRows<8>::gather_rows,
    LinearRows<8>::spread,
};

}  // namespace gatedkernels

#endif
