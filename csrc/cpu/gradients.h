// What the backward operators share: planes of the channels that a plan lists, filters turned round for the gradient of
// a convolution's input, and the gradient of its filters.
#pragma once

#include <vector>

#include "tensors.h"

namespace gatedkernels {

// For each sample one plane for every channel that the plan lists, one behind the other.
class Planes {
 public:
  // Room for planes of so many pixels, not filled in.
  Planes(const Plan& plan, int64_t pixels);
  // Those that lie in `memory`, (N, channels, pitch), already.
  Planes(const Plan& plan, const Tensor& memory);
  // Those of images of any strides.
  static Planes of(const Tensor& images, const Plan& plan);

  // Planes a power of two apart would fall into the same cache sets: they are kept a cache line off.
  static int64_t pitch_of(int64_t pixels) { return ceil_div(pixels, 16) * 16 + 16; }

  const Plan& plan() const { return *plan_; }
  int64_t pitch() const { return pitch_; }
  float* at(int64_t sample, int64_t position = 0) const { return data_ + offset_[sample] + position * pitch_; }

 private:
  const Plan* plan_;
  int64_t pitch_;
  Tensor memory_;
  float* data_;
  std::vector<int64_t> offset_;
};

// The filters (K, C, S, S) of a convolution as those of the one that gives its input's gradient at stride 1: input and
// output channels exchanged, the window mirrored, in the layouts of kernels.h. Channels that no sample of the plan uses
// are left as they are.
struct TurnedFilters {
  const bool by_taps;         // the weight is channels-last; else contiguous
  const Tensor weight;
  std::vector<int32_t> used;  // by how many samples, for every listed channel

  TurnedFilters(const Tensor& weight, const Plan& plan);
  // The plan lists the K output channels: one block of input channels, (K, S, S, kBlock), those of [from, to) of them.
  void block(int64_t block, int64_t from, int64_t to, float* turned) const;
  // The plan lists the C input channels: those of [from, to), as rows (C, S, S, K); `turned` is the first one of them.
  void rows(int64_t from, int64_t to, float* turned) const;

 private:
  template <int T>  // taps
  void rows_of(int64_t from, int64_t to, float* turned) const;

  const float* floats_;
};

// Weights that one item of work cannot share with others by way of a cache: it turns its own.
constexpr int64_t kLargeFilters = 1 << 20;  // floats

// The gradient of filters, (K, C, S, S), from an NHWC image and planes. One of them is the convolution's input
// (`input_lanes`: the image), the other one the gradient of its output. Channels that no plan lists get zeros.
Tensor filter_gradient(const Geometry& size, bool input_lanes, const Tensor& image, const Planes& planes);

}  // namespace gatedkernels
