// A residual block with its gate and its shortcut.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// The operator. A given mask opens what it says; the gate, which runs all the same, decides nothing then.
Tensor packed_residual(const Tensor& x, const Tensor& gate_weight1, const Tensor& gate_bias1,
                       const Tensor& gate_weight2, const Tensor& gate_bias2, const Tensor& weight1, const Tensor& bias1,
                       const Tensor& weight2, const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2,
                       const MaybeTensor& shortcut_weight, const MaybeTensor& shortcut_bias, const MaybeTensor& mask,
                       int64_t stride);

}  // namespace gatedkernels
