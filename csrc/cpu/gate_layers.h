// A gate's two layers and its threshold, from the mean of every channel to what is open.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/bring.h"
#include "tensors.h"

namespace gatedkernels {

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
class GateLayer {
 public:
  int64_t C, K;

  GateLayer(const Tensor& weight, const Tensor& bias)
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
  void run(Share rows, int64_t samples, const float* x, float* y) const {
    const float* bias = bias_.data() + rows.begin;
    const int64_t many = rows.many();
    if (narrow()) {
      kernels().linear_narrow(reinterpret_cast<const uint16_t*>(row(rows.begin)), bias, x, samples, C, many,
                              y + rows.begin);
    } else {
      kernels().linear(reinterpret_cast<const float*>(row(rows.begin)), bias, x, samples, C, many, y + rows.begin);
    }
  }

 private:
  bool narrow() const { return weight_.scalar_type() == ScalarType::BFloat16; }
  int64_t row_bytes() const { return C * weight_.element_size(); }
  const uint8_t* row(int64_t k) const {
    return static_cast<const uint8_t*>(weight_.const_data_ptr()) + row_bytes() * k;
  }

  const Tensor& weight_;
  std::vector<float> bias_;
};

// Both layers: a ReLU behind the first, the threshold behind the second.
class GateLayers {
 public:
  GateLayers(const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2, int64_t inputs)
      : first_(weight1, bias1), second_(weight2, bias2) {
    STD_TORCH_CHECK(first_.C == inputs && second_.C == first_.K, "the gate's weights are (M, C) and (K, M)");
  }

  int64_t inner() const { return first_.K; }
  int64_t decisions() const { return second_.K; }
  int64_t bytes() const { return first_.bytes() + second_.bytes(); }

  void fetch(int64_t part, int64_t parts) const {
    first_.fetch(rows(first_, part, parts));
    second_.fetch(rows(second_, part, parts));
  }

  // Part `part` of `parts` of a layer for one sample, or a whole layer for `samples`. `hidden` and `logits` have room
  // for all that the layers leave.
  void run_first(int64_t samples, int64_t part, int64_t parts, const float* mean, float* hidden) const {
    const Share share = rows(first_, part, parts);
    first_.run(share, samples, mean, hidden);
    for_each(share, samples, first_.K, [&](int64_t at) { hidden[at] = std::max(hidden[at], 0.0f); });
  }
  void run_second(int64_t samples, int64_t part, int64_t parts, const float* hidden, float* logits, bool* open) const {
    const Share share = rows(second_, part, parts);
    second_.run(share, samples, hidden, logits);
    for_each(share, samples, second_.K, [&](int64_t at) { open[at] = logits[at] >= 0.0f; });
  }

 private:
  static Share rows(const GateLayer& layer, int64_t part, int64_t parts) { return Share::of(layer.K, part, parts, 4); }

  template <class Each>
  static void for_each(Share share, int64_t samples, int64_t many, const Each& each) {
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t at = i * many + share.begin; at < i * many + share.end; ++at) each(at);
    }
  }

  GateLayer first_, second_;
};

}  // namespace gatedkernels
