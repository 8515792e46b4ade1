#include "dense.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>

namespace gatedkernels {
namespace {

// Floats of one item of a pass over memory: a few microseconds.
constexpr int64_t kPassFloats = 1 << 14;

// Bools are bytes of 0 or 1, added up eight at a time.
int64_t count_open(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_cpu(), "masks are bool, on the CPU");
  const Tensor packed = row_major(mask);
  const auto* bytes = reinterpret_cast<const uint8_t*>(packed.const_data_ptr<bool>());
  const int64_t total = packed.numel();
  constexpr int64_t kWords = 255;  // of which no byte overflows
  constexpr uint64_t kEven = 0x00ff00ff00ff00ff;
  int64_t open = 0, i = 0;
  while (i + 8 <= total) {
    uint64_t sums = 0;
    for (const int64_t end = std::min(i + 8 * kWords, total - 7); i < end; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      sums += word;
    }
    const uint64_t pairs = (sums & kEven) + (sums >> 8 & kEven);
    open += static_cast<int64_t>(pairs * 0x0001000100010001 >> 48);
  }
  for (; i < total; ++i) open += bytes[i];
  return open;
}

// The mask, or nothing where it closes nothing.
MaybeTensor closing(const MaybeTensor& mask) {
  return mask && count_open(*mask) < mask->numel() ? MaybeTensor(row_major(*mask)) : std::nullopt;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < 4; ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// One pass from x to y, which may be the same, contiguous or channels-last: adds the residual, of the same layout,
// rectifies, closes channels.
void finish(const Tensor& x, Tensor& y, const MaybeTensor& residual, const MaybeTensor& mask, bool relu) {
  const int64_t N = y.size(0), C = y.size(1), pixels = y.size(2) * y.size(3);
  STD_TORCH_CHECK(!mask || mask->numel() == N * C, "a mask has a decision for every channel of every sample");
  if (y.numel() == 0) return;
  const bool planes = y.is_contiguous();
  const int64_t rows = planes ? C : pixels, columns = planes ? pixels : C;
  const int64_t step = std::max<int64_t>(kPassFloats / columns, 1), items = ceil_div(rows, step);
  const float* from = floats(x);
  float* to = y.mutable_data_ptr<float>();
  const float* skip = floats(residual);
  const bool* decisions = mask ? mask->const_data_ptr<bool>() : nullptr;
  const bool by_column = decisions && !planes;
  const auto run = kernels().finish_row;
  torch::stable::parallel_for(0, N * items, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> open(by_column ? C : 0);  // all bits, or none
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / items, first = item % items * step, last = std::min(first + step, rows);
      const bool* decided = decisions ? decisions + n * C : nullptr;
      for (size_t c = 0; c < open.size(); ++c) open[c] = -static_cast<int32_t>(decided[c]);
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = (n * rows + row) * columns;
        if (planes && decided && !decided[row]) {
          std::memset(to + at, 0, columns * sizeof(float));
        } else {
          run(from + at, skip ? skip + at : nullptr, by_column ? open.data() : nullptr, relu, columns, to + at);
        }
      }
    }
  });
}

// Nothing is recorded for autograd, which knows the whole operator.
struct WithoutGradients {
  const bool before = aoti_torch_grad_mode_is_enabled();
  WithoutGradients() { aoti_torch_grad_mode_set_enabled(false); }
  ~WithoutGradients() { aoti_torch_grad_mode_set_enabled(before); }
};

// Square filters that keep the size. By way of the C interface, as `empty`.
Tensor convolve(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t stride) {
  const WithoutGradients guard;
  const int64_t strides[] = {stride, stride}, padding[] = {weight.size(2) / 2, weight.size(3) / 2};
  const int64_t ones[] = {1, 1}, zeros[] = {0, 0};
  AtenTensorHandle b = bias ? bias->get() : nullptr, y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(x.get(), weight.get(), bias ? &b : nullptr, strides, 2, padding, 2,
                                                    ones, 2, 0, zeros, 2, 1, &y));
  return Tensor(y);
}

// Images in the layout in which the convolution is the faster one: channels-last images take their filters along, which
// costs more than it gains where a batch has few pixels. Converting pays for `so_many` times as many weights as images.
Tensor in_best_layout(const Tensor& x, int64_t weights, int64_t so_many) {
  return so_many * x.numel() < weights ? in_layout(x, MemoryFormat::Contiguous) : x;
}

}  // namespace

bool too_dense(const MaybeTensor& mask, double threshold) {
  if (threshold >= 1 || !mask) return threshold < 1;
  return static_cast<double>(count_open(*mask)) > threshold * static_cast<double>(mask->numel());
}

Tensor dense_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_mask,
                    const MaybeTensor& out_mask, int64_t stride, MemoryFormat format) {
  Tensor images = in_best_layout(x, weight.numel(), 5);
  if (const MaybeTensor closed = closing(in_mask)) {
    const MemoryFormat own = layout_like(images);
    const Tensor all = in_layout(images, own);
    images = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Float, own);
    finish(all, images, std::nullopt, closed, false);
  }
  Tensor y = convolve(images, weight, bias, stride);
  if (const MaybeTensor closed = closing(out_mask)) finish(y, y, std::nullopt, closed, false);
  return in_layout(y, format);
}

Tensor dense_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                   const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride,
                   MemoryFormat format) {
  Tensor hidden = convolve(in_best_layout(x, weight1.numel() + weight2.numel(), 4), weight1, bias1, stride);
  finish(hidden, hidden, std::nullopt, closing(mask), true);
  Tensor y = convolve(hidden, weight2, bias2, 1);
  MaybeTensor skip;
  if (residual) skip = in_layout(*residual, layout_like(y));
  STD_TORCH_CHECK(!skip || same_strides(*skip, y), "residual has the shape of the result");
  finish(y, y, skip, std::nullopt, true);
  return in_layout(y, format);
}

}  // namespace gatedkernels
