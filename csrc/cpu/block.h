// The packed gated basic block, for the dtypes that it has drivers for.
#pragma once

#include "tensors.h"

namespace gatedkernels {

// The operator, for float32 and bfloat16.
Tensor packed_block(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2, const Tensor& mask,
                    const MaybeTensor& residual, int64_t stride);

// The same with a shortcut instead of the residual: a 1 x 1 convolution of x with the block's stride, weights packed.
Tensor block_and_shortcut(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                          const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2, const Plan& plan,
                          const MaybeTensor& residual, const MaybeTensor& shortcut_weight,
                          const MaybeTensor& shortcut_bias, int64_t stride);

// block_and_shortcut for bfloat16 alone; shapes are checked already.
Tensor block_and_shortcut_bf16(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                               const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2,
                               const Plan& plan, const MaybeTensor& residual, const MaybeTensor& shortcut_weight,
                               const MaybeTensor& shortcut_bias, int64_t stride);

}  // namespace gatedkernels
