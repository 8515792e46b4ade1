// The channel gate at inference: pooling, two small layers and the threshold, in one pass; and the pooling alone.
#include <algorithm>
#include <atomic>
#include <vector>

#include "gate.h"
#include "gate_layers.h"

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
  Gate(const Pixels& pixels, const GateLayers& layers, bool* open) : pixels_(pixels), layers_(layers), open_(open) {}

  void run() const {
    // Weights that come from memory are worth the waiting of threads for each other.
    constexpr int64_t kManyBytes = 1 << 17;
    if (pixels_.N == 1 && threads() > 1 && layers_.bytes() >= kManyBytes) return run_shared();
    const int64_t together = std::clamp<int64_t>(pixels_.N / (2 * threads()), 1, kTogether);
    const int64_t items = ceil_div(pixels_.N, together);
    in_order(items, [&](int64_t item) {
      // From the last samples, which were written last, to the first ones, with which convolutions begin: so that a
      // cache that does not hold them all holds some.
      const int64_t first = (items - 1 - item) * together, samples = std::min(together, pixels_.N - first);
      Values values(*this, samples);
      if (item < threads()) layers_.fetch(0, 1);
      for (int step = 0; step < kSteps; ++step) run_step(step, first, samples, 0, 1, values);
    });
  }

 private:
  static constexpr int kSteps = 3;
  static constexpr int64_t kTogether = 8;

  struct Values {
    std::vector<float> mean, hidden, logits;
    Values(const Gate& gate, int64_t samples)
        : mean(samples * gate.pixels_.C),
          hidden(samples * gate.layers_.inner()),
          logits(samples * gate.layers_.decisions()) {}
  };

  void run_shared() const {
    const int64_t parts = threads();
    Values values(*this, 1);
    std::atomic<int64_t> done{0};
    in_order(kSteps * parts, [&](int64_t item) {
      const int64_t step = item / parts, part = item % parts;
      if (step == 0) layers_.fetch(part, parts);
      wait_until([&] { return done.load(std::memory_order_acquire) >= step * parts; });
      run_step(static_cast<int>(step), 0, 1, part, parts, values);
      done.fetch_add(1, std::memory_order_release);
    });
  }

  // Part `part` of `parts` of a step for samples [first, first + samples).
  void run_step(int step, int64_t first, int64_t samples, int64_t part, int64_t parts, Values& values) const {
    float *const mean = values.mean.data(), *const hidden = values.hidden.data();
    if (step == 0) {
      const Share channels = Share::of(pixels_.C, part, parts, 64);
      for (int64_t i = samples - 1; i >= 0; --i) pixels_.mean(first + i, channels, mean + i * pixels_.C);
    } else if (step == 1) {
      layers_.run_first(samples, part, parts, mean, hidden);
    } else {
      bool* const open = open_ + first * layers_.decisions();
      layers_.run_second(samples, part, parts, hidden, values.logits.data(), open);
    }
  }

  const Pixels& pixels_;
  const GateLayers& layers_;
  bool* open_;
};

}  // namespace

Tensor channel_gate(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2) {
  Tensor mask = empty({x.size(0), weight2.size(0)}, ScalarType::Bool);
  decide(x, weight1, bias1, weight2, bias2, mask.mutable_data_ptr<bool>());
  return mask;
}

void decide(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
            bool* open) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU");
  const Pixels pixels(x);
  Gate(pixels, GateLayers(weight1, bias1, weight2, bias2, pixels.C), open).run();
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
