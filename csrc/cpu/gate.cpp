// The channel gate at inference: pooling, two small layers and the threshold, in one pass; and the pooling alone.
#include <algorithm>

#include "cpu/bring.h"
#include "gate.h"

namespace gatedkernels {
namespace {

Tensor wide(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 ? converted(t, ScalarType::Float) : t; }

// The means of an image's pixels. bfloat16 is read as it lies where pixels are rows of channels, else in float32.
class Pixels {
 public:
  int64_t N, C, H, W;

  explicit Pixels(const Tensor& given)
      : N(given.size(0)),
        C(given.size(1)),
        H(given.size(2)),
        W(given.size(3)),
        narrow_(given.scalar_type() == ScalarType::BFloat16 && given.stride(1) == 1 ? bf16_kernels() : nullptr),
        x_(narrow_ ? given : wide(given)) {
    if (!narrow_) check_float(x_, 4);
  }

  void mean(int64_t n, std::vector<float>& mean) const {
    mean.assign(C, 0.0f);
    for (int64_t h = 0; h < H; ++h) add_row(n, h, mean.data());
    for (float& m : mean) m /= static_cast<float>(H * W);
  }

 private:
  void add_row(int64_t n, int64_t h, float* sum) const {
    const int64_t at = n * x_.stride(0) + h * x_.stride(2), sc = x_.stride(1), sw = x_.stride(3);
    if (narrow_) return narrow_->add_pixels(bf16s(x_) + at, W, sw, C, sum);
    const float* row = floats(x_) + at;
    if (sc == 1) return kernels().add_pixels(row, W, sw, C, sum);
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t w = 0; w < W; ++w) sum[c] += row[c * sc + w * sw];
    }
  }

  const Bf16Kernels* narrow_;
  Tensor x_;
};

}  // namespace

Tensor channel_gate(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU");
  const Pixels pixels(x);
  const Tensor matrix1 = wide(weight1), matrix2 = wide(weight2), shift1 = wide(bias1), shift2 = wide(bias2);
  check_float(matrix1, 2), check_float(matrix2, 2);
  const int64_t C = pixels.C, hidden = weight1.size(0), out = weight2.size(0);
  STD_TORCH_CHECK(weight1.size(1) == C && weight2.size(1) == hidden && matrix1.is_contiguous() &&
                      matrix2.is_contiguous() && bias1.size(0) == hidden && bias2.size(0) == out,
                  "the gate's weights are (M, C) and (K, M)");
  Tensor mask = empty({pixels.N, out}, ScalarType::Bool);
  const float *w1 = floats(matrix1), *b1 = floats(shift1), *w2 = floats(matrix2), *b2 = floats(shift2);
  bool* open = mask.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, pixels.N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mean, inner(hidden), logits(out);
    bring(w1, hidden * C), bring(w2, out * hidden);
    for (int64_t n = begin; n < end; ++n) {
      pixels.mean(n, mean);
      kernels().linear(w1, b1, mean.data(), C, hidden, inner.data());
      for (float& value : inner) value = std::max(value, 0.0f);
      kernels().linear(w2, b2, inner.data(), hidden, out, logits.data());
      for (int64_t k = 0; k < out; ++k) open[n * out + k] = logits[k] >= 0.0f;
    }
  });
  return mask;
}

Tensor packed_pool(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU");
  const Pixels pixels(x);
  Tensor y = empty({pixels.N, pixels.C});
  float* out = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, pixels.N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mean;
    for (int64_t n = begin; n < end; ++n) {
      pixels.mean(n, mean);
      std::copy(mean.begin(), mean.end(), out + n * pixels.C);
    }
  });
  return converted(y, x.scalar_type());
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("channel_gate", TORCH_BOX(&gatedkernels::channel_gate));
  m.impl("packed_pool", TORCH_BOX(&gatedkernels::packed_pool));
}
