// The kernels for any processor.

#include "cpu/gate_rows.h"
#include "cpu/in_rows.h"
#include "cpu/linear_rows.h"
#include "cpu/out_rows.h"

namespace gatedkernels {

const Kernels kPortableKernels = {
    "portable",
    OutRows<4>::run,
    InRows<4>::run,
    GateRows<4>::add_pixels,
    GateRows<4>::linear,
    LinearRows<4>::panel,
    LinearRows<4>::gather_rows,
    LinearRows<4>::spread,
};

}  // namespace gatedkernels
