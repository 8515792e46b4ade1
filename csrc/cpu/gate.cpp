// The channel gate at inference: pooling, two small layers and the threshold, in one pass.
#include <algorithm>

#include "cpu/bring.h"
#include "tensors.h"

namespace gatedkernels {

Tensor channel_gate(const Tensor& given_x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2) {
  const ScalarType dtype = given_x.scalar_type();
  STD_TORCH_CHECK(given_x.dim() == 4 && given_x.is_cpu(), "x is (N, C, H, W) on the CPU");
  // bfloat16 is read as it lies where pixels are rows of channels, and in float32 elsewhere; weights may be of either.
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  const Bf16Kernels* narrow = is_bf16 && given_x.stride(1) == 1 ? bf16_kernels() : nullptr;
  auto wide = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::BFloat16 ? converted(t, ScalarType::Float) : t;
  };
  const Tensor x = narrow ? given_x : wide(given_x), matrix1 = wide(weight1), matrix2 = wide(weight2);
  const Tensor shift1 = wide(bias1), shift2 = wide(bias2);
  check_float(matrix1, 2), check_float(matrix2, 2);
  if (!narrow) check_float(x, 4);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t hidden = weight1.size(0), out = weight2.size(0);
  STD_TORCH_CHECK(weight1.size(1) == C && weight2.size(1) == hidden && matrix1.is_contiguous() &&
                      matrix2.is_contiguous() && bias1.size(0) == hidden && bias2.size(0) == out,
                  "the gate's weights are (M, C) and (K, M)");
  Tensor mask = empty({N, out}, ScalarType::Bool);
  const float *w1 = floats(matrix1), *b1 = floats(shift1), *w2 = floats(matrix2), *b2 = floats(shift2);
  bool* open = mask.mutable_data_ptr<bool>();
  const int64_t sn = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  auto add_row = [&](int64_t n, int64_t h, float* sum) {
    if (narrow) {
      narrow->add_pixels(bf16s(x) + n * sn + h * sh, W, sw, C, sum);
      return;
    }
    const float* row = floats(x) + n * sn + h * sh;
    if (sc == 1) {
      kernels().add_pixels(row, W, sw, C, sum);
      return;
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t w = 0; w < W; ++w) sum[c] += row[c * sc + w * sw];
    }
  };
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mean(C), inner(hidden);
    for (int64_t n = begin; n < end; ++n) {
      if (n == begin) bring(w1, hidden * C), bring(w2, out * hidden);
      std::fill(mean.begin(), mean.end(), 0.0f);
      for (int64_t h = 0; h < H; ++h) add_row(n, h, mean.data());
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
