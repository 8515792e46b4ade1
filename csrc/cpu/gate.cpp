// The channel gate at inference: pooling, two small layers and the threshold, in one pass.
#include <algorithm>

#include "tensors.h"

namespace gatedkernels {

Tensor channel_gate(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2) {
  check_float(x, 4), check_float(weight1, 2), check_float(weight2, 2);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t hidden = weight1.size(0), out = weight2.size(0);
  STD_TORCH_CHECK(weight1.size(1) == C && weight2.size(1) == hidden && weight1.is_contiguous() &&
                      weight2.is_contiguous() && bias1.size(0) == hidden && bias2.size(0) == out,
                  "the gate's weights are (M, C) and (K, M)");
  Tensor mask = empty({N, out}, ScalarType::Bool);
  const float *from = floats(x), *w1 = floats(weight1), *b1 = floats(bias1), *w2 = floats(weight2),
              *b2 = floats(bias2);
  bool* open = mask.mutable_data_ptr<bool>();
  const int64_t sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mean(C), inner(hidden);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(mean.begin(), mean.end(), 0.0f);
      const float* image = from + n * x.stride(0);
      for (int64_t h = 0; h < H; ++h) {
        if (sc == 1) {
          kernels().add_pixels(image + h * sh, W, sw, C, mean.data());
        } else {
          for (int64_t c = 0; c < C; ++c) {
            for (int64_t w = 0; w < W; ++w) mean[c] += image[c * sc + h * sh + w * sw];
          }
        }
      }
      for (float& m : mean) m /= static_cast<float>(H * W);
      kernels().linear(w1, b1, mean.data(), C, hidden, inner.data());
      for (float& value : inner) value = std::max(value, 0.0f);
      std::vector<float> logits(out);
      kernels().linear(w2, b2, inner.data(), hidden, out, logits.data());
      for (int64_t k = 0; k < out; ++k) open[n * out + k] = logits[k] >= 0.0f;
    }
  });
  return mask;
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) { m.impl("channel_gate", TORCH_BOX(&gatedkernels::channel_gate)); }
