// The first convolution of a network, and its pooling.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// float32 images of any layout to NHWC pixels.
Tensor packed_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                   bool relu, bool pool);

}  // namespace gatedkernels
