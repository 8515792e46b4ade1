// The channel gate at inference: pooling, two small layers and the threshold, in one pass; and the pooling alone.
#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "cpu/bring.h"
#include "gate.h"

namespace gatedkernels {
namespace {

Tensor wide(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 ? converted(t, ScalarType::Float) : t; }

// Of a vector's elements or a matrix's rows, [begin, end).
struct Share {
  int64_t begin, end;

  // Part `part` of `parts`, cut where vectors end, so that sums are the same however many threads there are.
  static Share of(int64_t total, int64_t part, int64_t parts, int64_t unit) {
    const int64_t units = ceil_div(total, unit);
    return {std::min(units * part / parts * unit, total), std::min(units * (part + 1) / parts * unit, total)};
  }

  int64_t many() const { return end - begin; }
};

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

  int64_t bytes() const { return K * row_bytes(); }

  void fetch(Share rows) const { bring(row(rows.begin), row_bytes() * rows.many()); }

  // Some rows for one sample, or all of them for `samples`.
  void run(Share rows, int64_t samples, const std::vector<float>& x, std::vector<float>& y) const {
    const float* bias = bias_.data() + rows.begin;
    const int64_t many = rows.many();
    float* to = y.data() + rows.begin;
    if (narrow()) {
      kernels().linear_narrow(reinterpret_cast<const uint16_t*>(row(rows.begin)), bias, x.data(), samples, C, many, to);
    } else {
      kernels().linear(reinterpret_cast<const float*>(row(rows.begin)), bias, x.data(), samples, C, many, to);
    }
  }

 private:
  bool narrow() const { return weight_.scalar_type() == ScalarType::BFloat16; }
  int64_t row_bytes() const { return C * weight_.element_size(); }
  const uint8_t* row(int64_t k) const { return static_cast<const uint8_t*>(weight_.const_data_ptr()) + row_bytes() * k; }

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

  // Of the channels of a share, to their places in `mean`.
  void mean(int64_t n, Share channels, float* mean) const {
    float* sum = mean + channels.begin;
    std::fill_n(sum, channels.many(), 0.0f);
    for (int64_t h = 0; h < H; ++h) add_row(n, h, channels, sum);
    for (int64_t c = 0; c < channels.many(); ++c) sum[c] /= static_cast<float>(H * W);
  }

 private:
  void add_row(int64_t n, int64_t h, Share channels, float* sum) const {
    const int64_t sc = x_.stride(1), sw = x_.stride(3);
    const int64_t at = n * x_.stride(0) + channels.begin * sc + h * x_.stride(2);
    if (narrow_) return narrow_->add_pixels(bf16s(x_) + at, W, sw, channels.many(), sum);
    const float* row = floats(x_) + at;
    if (sc == 1) return kernels().add_pixels(row, W, sw, channels.many(), sum);
    for (int64_t c = 0; c < channels.many(); ++c) {
      for (int64_t w = 0; w < W; ++w) sum[c] += row[c * sc + w * sw];
    }
  }

  const Bf16Kernels* narrow_;
  Tensor x_;
};

// The decisions of every sample: three steps, which some samples take together, or the threads for one sample.
class Gate {
 public:
  Gate(const Pixels& pixels, const Layer& first, const Layer& second, bool* open)
      : pixels_(pixels), first_(first), second_(second), open_(open) {}

  void run() const {
    // Weights that come from memory are worth the waiting of threads for each other.
    constexpr int64_t kManyBytes = 1 << 17;
    if (pixels_.N == 1 && threads() > 1 && first_.bytes() + second_.bytes() >= kManyBytes) return run_shared();
    torch::stable::parallel_for(0, pixels_.N, 1, [&](int64_t begin, int64_t end) {
      Values values(*this, std::min(kTogether, end - begin));
      fetch(0, 1);
      for (int64_t n = begin; n < end; n += kTogether) {
        const int64_t samples = std::min(kTogether, end - n);
        for (int step = 0; step < kSteps; ++step) run_step(step, n, samples, 0, 1, values);
      }
    });
  }

 private:
  static constexpr int kSteps = 3;
  static constexpr int64_t kTogether = 8;

  struct Values {
    std::vector<float> mean, inner, logits;
    Values(const Gate& gate, int64_t samples)
        : mean(samples * gate.first_.C), inner(samples * gate.first_.K), logits(samples * gate.second_.K) {}
  };

  void run_shared() const {
    const int64_t parts = threads();
    Values values(*this, 1);
    std::atomic<int64_t> done{0};
    in_order(kSteps * parts, [&](int64_t item) {
      const int64_t step = item / parts, part = item % parts;
      if (step == 0) fetch(part, parts);
      wait_until([&] { return done.load(std::memory_order_acquire) >= step * parts; });
      run_step(static_cast<int>(step), 0, 1, part, parts, values);
      done.fetch_add(1, std::memory_order_release);
    });
  }

  void fetch(int64_t part, int64_t parts) const {
    first_.fetch(rows(first_, part, parts));
    second_.fetch(rows(second_, part, parts));
  }

  // Part `part` of `parts` of a step for samples [first, first + samples).
  void run_step(int step, int64_t first, int64_t samples, int64_t part, int64_t parts, Values& values) const {
    if (step == 0) {
      const Share channels = Share::of(pixels_.C, part, parts, 64);
      for (int64_t i = 0; i < samples; ++i) pixels_.mean(first + i, channels, values.mean.data() + i * pixels_.C);
      return;
    }
    const Layer& layer = step == 1 ? first_ : second_;
    const Share share = rows(layer, part, parts);
    std::vector<float>& to = step == 1 ? values.inner : values.logits;
    layer.run(share, samples, step == 1 ? values.mean : values.inner, to);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t at = i * layer.K + share.begin; at < i * layer.K + share.end; ++at) {
        if (step == 1) {
          to[at] = std::max(to[at], 0.0f);
        } else {
          open_[first * layer.K + at] = to[at] >= 0.0f;
        }
      }
    }
  }

  static Share rows(const Layer& layer, int64_t part, int64_t parts) { return Share::of(layer.K, part, parts, 4); }

  const Pixels& pixels_;
  const Layer &first_, &second_;
  bool* open_;
};

}  // namespace

Tensor channel_gate(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU");
  const Pixels pixels(x);
  const Layer first(weight1, bias1), second(weight2, bias2);
  STD_TORCH_CHECK(first.C == pixels.C && second.C == first.K, "the gate's weights are (M, C) and (K, M)");
  Tensor mask = empty({pixels.N, second.K}, ScalarType::Bool);
  Gate(pixels, first, second, mask.mutable_data_ptr<bool>()).run();
  return mask;
}

Tensor packed_pool(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU");
  const Pixels pixels(x);
  Tensor y = empty({pixels.N, pixels.C});
  float* out = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, pixels.N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) pixels.mean(n, {0, pixels.C}, out + n * pixels.C);
  });
  return converted(y, x.scalar_type());
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("channel_gate", TORCH_BOX(&gatedkernels::channel_gate));
  m.impl("packed_pool", TORCH_BOX(&gatedkernels::packed_pool));
}
