// The dense way to a gated result: PyTorch's convolution, and zeros in the closed channels.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// Whether more than a part `threshold` of the decisions is open, so that the dense way is the faster one. Without a
// mask all are; nothing exceeds a threshold of 1.
bool too_dense(const MaybeTensor& mask, double threshold);

// The operators of the same names on float32 tensors, in the dense way; results are in the given layout.
Tensor dense_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_mask,
                    const MaybeTensor& out_mask, int64_t stride, MemoryFormat format);
Tensor dense_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                   const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride,
                   MemoryFormat format);

}  // namespace gatedkernels
