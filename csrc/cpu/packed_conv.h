// The packed convolution, for the dtypes that it has drivers for.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// The operator, for float32 and bfloat16.
Tensor packed_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                     const MaybeTensor& out_mask, const MaybeTensor& residual, int64_t out_channels, int64_t stride,
                     bool relu);

// The same for bfloat16 alone; shapes are checked already.
Tensor packed_conv2d_bf16(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                          const MaybeTensor& out_mask, const MaybeTensor& residual, int64_t out_channels,
                          int64_t stride, bool relu);

}  // namespace gatedkernels
