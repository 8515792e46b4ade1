// The kernels for any processor.

#include "cpu/kernel_table.h"

namespace gatedkernels {

const Kernels kPortableKernels = kernels_of<4>("portable");

}  // namespace gatedkernels
