// The channel gate at inference: pooling, two small layers and the threshold, in one pass; and the pooling alone.
#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/bring.h"
#include "gate.h"

namespace gatedkernels {
namespace {

Tensor wide(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 ? converted(t, ScalarType::Float) : t; }

// One layer of a gate, of float32 or bfloat16 weights (K, C).
class Layer {
 public:
  int64_t C, K;

  Layer(const Tensor& weight, const Tensor& bias)
      : C(weight.size(1)), K(weight.size(0)), weight_(weight), bias_(K) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous() && bias.size(0) == K,
                    "a layer of the gate has weights (K, C) and a bias (K,)");
    STD_TORCH_CHECK(bias.scalar_type() == weight.scalar_type() && bias.is_contiguous(), "its bias is as its weights");
    if (!narrow()) {
      check_float(weight, 2);
      std::copy_n(floats(bias), K, bias_.begin());
      return;
    }
    // Not by an operator: its code would be cold, and take longer than the layer.
    const auto* from = static_cast<const uint16_t*>(bias.const_data_ptr());
    std::transform(from, from + K, bias_.begin(),
                   [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); });
  }

  void fetch() const { bring(static_cast<const uint8_t*>(weight_.const_data_ptr()), K * C * weight_.element_size()); }

  void run(const std::vector<float>& x, std::vector<float>& y) const {
    if (narrow()) {
      kernels().linear_narrow(static_cast<const uint16_t*>(weight_.const_data_ptr()), bias_.data(), x.data(), C, K,
                              y.data());
    } else {
      kernels().linear(floats(weight_), bias_.data(), x.data(), C, K, y.data());
    }
  }

 private:
  bool narrow() const { return weight_.scalar_type() == ScalarType::BFloat16; }

  const Tensor& weight_;
  std::vector<float> bias_;
};

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
  const Layer first(weight1, bias1), second(weight2, bias2);
  STD_TORCH_CHECK(first.C == pixels.C && second.C == first.K, "the gate's weights are (M, C) and (K, M)");
  Tensor mask = empty({pixels.N, second.K}, ScalarType::Bool);
  bool* open = mask.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, pixels.N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mean, inner(first.K), logits(second.K);
    first.fetch(), second.fetch();
    for (int64_t n = begin; n < end; ++n) {
      pixels.mean(n, mean);
      first.run(mean, inner);
      for (float& value : inner) value = std::max(value, 0.0f);
      second.run(inner, logits);
      std::transform(logits.begin(), logits.end(), open + n * second.K, [](float logit) { return logit >= 0.0f; });
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
