// Between contiguous and channels-last images: a transposition of channels and pixels.
#include <algorithm>

#include "squares.h"
#include "tensors.h"

namespace gatedkernels {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line

}  // namespace

void transpose(const float* from, float* to, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t step) {
  const int64_t whole = begin + (end - begin) / 4 * 4;
  for (int64_t first = 0; first < rows; first += kLine) {
    const int64_t last = std::min(first + kLine, rows);
    int64_t r = first;
    for (; r + 4 <= last; r += 4) {
      for (int64_t c = begin; c < whole; c += 4) {
        transpose_square(from + r * columns + c, columns, to + c * step + r, step);
      }
    }
    for (int64_t at = first; at < last; ++at) {
      for (int64_t c = at < r ? whole : begin; c < end; ++c) to[c * step + at] = from[at * columns + c];
    }
  }
}

bool is_channels_last(const Tensor& t) {
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

MemoryFormat layout_like(const Tensor& x) {
  return !x.is_contiguous() && is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor in_layout(Tensor images, MemoryFormat format) {
  const bool to_channels_last = format == MemoryFormat::ChannelsLast;
  if (to_channels_last ? is_channels_last(images) : images.is_contiguous()) return images;
  const bool other = to_channels_last ? images.is_contiguous() : is_channels_last(images);
  if (!other || images.scalar_type() != ScalarType::Float) return library_contiguous(images, format);
  const int64_t N = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  Tensor moved = empty({N, C, H, W}, ScalarType::Float, format);
  const int64_t rows = to_channels_last ? C : H * W, columns = to_channels_last ? H * W : C;
  const int64_t strips = ceil_div(columns, kLine), grain = ceil_div(1 << 13, rows * kLine);
  const float* from = floats(images);
  float* to = moved.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, N * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / strips * rows * columns, first = i % strips * kLine;
      transpose(from + image, to + image, rows, columns, first, std::min(first + kLine, columns), rows);
    }
  });
  return moved;
}

}  // namespace gatedkernels
