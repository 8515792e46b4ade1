// Convolutions with a width for every sample on Winograd's components.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// Whether they pay, transforming the filters included; null plans: every channel.
bool sliced_tiles_pay(const Tensor& x, const Tensor& weight, int64_t stride, const Plan* ins, const Plan* outs);

// filters: as `weight_blocks` packs them; null plans: every channel. Writes NHWC pixels of all K output channels, zeros
// beyond a sample's width.
Tensor sliced_on_tiles(const Tensor& x, const float* filters, const float* bias, int64_t K, const Plan* ins,
                       const Plan* outs);

}  // namespace gatedkernels
