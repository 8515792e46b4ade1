// Single convolutions in the layouts of kernels.h, for the operators that prepare these themselves.
#pragma once

#include <vector>

#include "tensors.h"

namespace gatedkernels {

// x, NHWC, with zeros in the closed channels: what it held there is never read.
Tensor open_channels(const Tensor& x, const MaybeTensor& in_mask);

// Rows of one item of an image, so that every thread finds several of them.
int64_t band(int64_t height, int64_t pieces, double operations_a_row);

// The output channels that the plan lists, zeros in the others; x is NHWC, rows are (K, S, S, C).
Tensor out_gated(const Tensor& x, const float* rows, int64_t K, int64_t taps, const float* bias, const Plan& plan,
                 int64_t stride, MemoryFormat layout = MemoryFormat::ChannelsLast);

// The operator, for float32 and bfloat16.
Tensor packed_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                     const MaybeTensor& out_mask, const MaybeTensor& residual, int64_t out_channels, int64_t stride,
                     bool relu);

// The same for bfloat16 alone; shapes are checked already.
Tensor packed_conv2d_bf16(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                          const MaybeTensor& out_mask, const MaybeTensor& residual, int64_t out_channels,
                          int64_t stride, bool relu);

}  // namespace gatedkernels
