// The first convolution of a network, and its pooling.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// Images of any layout, float32 or bfloat16 as the weights are, to NHWC pixels. `tiles` are the weights transformed for
// stem_tiles.h.
Tensor packed_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                   bool relu, bool pool, const MaybeTensor& tiles = std::nullopt);

}  // namespace gatedkernels
