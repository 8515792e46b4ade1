// The kernels for any processor.

#include "cpu/gate_rows.h"
#include "cpu/in_rows.h"
#include "cpu/out_rows.h"

namespace gatedkernels {

const Kernels kPortableKernels = {"portable", OutRows<Float32<4>>::run, InRows<Float32<4>>::run,
                                 GateRows<4>::add_pixels, GateRows<4>::linear};

}  // namespace gatedkernels
