// What is computed from the mean of an image's pixels.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// The operator, for float32 and bfloat16 images of any layout; weights may be of either dtype.
Tensor channel_gate(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2);

// The same to memory for (N, K) decisions.
void decide(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
            bool* open);

// Images (N, C, H, W) of either dtype to (N, C).
Tensor packed_pool(const Tensor& x);

}  // namespace gatedkernels
