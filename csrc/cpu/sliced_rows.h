// Convolutions with a width for every sample, by rows of weights as they lie.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// Null plans: every channel. Writes NHWC pixels of all output channels, zeros beyond a sample's width.
Tensor sliced_on_rows(const Tensor& x, const Tensor& weight, const float* bias, const Plan* ins, const Plan* outs,
                      int64_t stride);

}  // namespace gatedkernels
