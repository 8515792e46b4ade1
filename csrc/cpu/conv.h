// Single convolutions in the layouts of kernels.h, for the operators that prepare these themselves.
#pragma once

#include <vector>

#include "tensors.h"

namespace gatedkernels {

// x, NHWC, with zeros in the closed channels: what it held there is never read.
Tensor open_channels(const Tensor& x, const MaybeTensor& in_mask);

// NHWC pixels of all output channels, or of those that out_mask (N, K) opens; null plan: every input channel.
Tensor in_gated(const InConv& conv, const std::vector<const float*>& samples, const Plan* plan, const bool* out_mask,
                const MaybeTensor& residual);

// NHWC pixels of the output channels that the plan lists, zeros in the others; x is NHWC, rows are (K, S, S, C).
Tensor out_gated(const Tensor& x, const float* rows, int64_t K, int64_t taps, const float* bias, const Plan& plan,
                 int64_t stride);

}  // namespace gatedkernels
