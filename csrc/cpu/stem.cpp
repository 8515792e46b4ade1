// The first convolution of a network, and its pooling, from images of any layout to NHWC pixels.
#include <algorithm>

#include "stem.h"

namespace gatedkernels {
namespace {

int64_t pooled(int64_t length) { return (length - 1) / 2 + 1; }

// Rows of one image with their padding, which may lie above and below the image; NHWC.
void pad_rows(const Tensor& x, int64_t sample, int64_t padding, int64_t from, int64_t to, float* padded) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const float* image = floats(x) + sample * x.stride(0);
  for (int64_t y = from; y < to; ++y) {
    float* const end = padded + (W + 2 * padding) * C;
    if (y < 0 || y >= H) {
      padded = std::fill_n(padded, end - padded, 0.0f);
      continue;
    }
    padded = std::fill_n(padded, padding * C, 0.0f);
    const float* row = image + y * sh;
    if (sc == 1 && sw == C) {
      padded = std::copy_n(row, W * C, padded);
    } else {
      for (int64_t w = 0; w < W; ++w) {
        for (int64_t c = 0; c < C; ++c) *padded++ = row[w * sw + c * sc];
      }
    }
    padded = std::fill_n(padded, end - padded, 0.0f);
  }
}

// Pixels of pooling by 3 x 3 windows of stride 2 and padding 1: output row `row` of an image of OH x OW pixels, of
// which `conv` holds the rows from `first` on.
void pool_row(const float* conv, int64_t first, int64_t row, int64_t OH, int64_t OW, int64_t K, float* y) {
  for (int64_t column = 0; column < pooled(OW); ++column, y += K) {
    const float* pixels[9];
    int count = 0;
    for (int64_t r = std::max<int64_t>(2 * row - 1, 0); r <= std::min(2 * row + 1, OH - 1); ++r) {
      for (int64_t c = std::max<int64_t>(2 * column - 1, 0); c <= std::min(2 * column + 1, OW - 1); ++c) {
        pixels[count++] = conv + ((r - first) * OW + c) * K;
      }
    }
    kernels_for(K).max_pixels(pixels, count, K, y);
  }
}

}  // namespace

// With `pool`, pooled as torchvision's ResNets are; what is pooled never leaves the cache.
Tensor packed_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                   bool relu, bool pool) {
  check_float(x, 4), check_float(weight, 4);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), K = bias.size(0), S = weight.size(1);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == ceil_div(K, kBlock) && weight.size(2) == S * C &&
                      weight.size(3) == kBlock && bias.is_contiguous(),
                  "weight is packed as (K / 32, S, S * C, 32)");
  STD_TORCH_CHECK(H + 2 * padding >= S && W + 2 * padding >= S, "the window fits into the padded image");
  const int64_t OH = (H + 2 * padding - S) / stride + 1, OW = (W + 2 * padding - S) / stride + 1;
  const int64_t height = pool ? pooled(OH) : OH, width = pool ? pooled(OW) : OW;
  Tensor y = empty({N, K, height, width}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const int64_t line = (W + 2 * padding) * C;
  const StemConv conv{static_cast<int>(C),      static_cast<int>(K), static_cast<int>(S), static_cast<int>(stride),
                      static_cast<int>(OW),     line,                floats(weight),      floats(bias),
                      relu};
  // Items are about the usual size, but pooled ones compute a row twice where they meet, and should seldom.
  constexpr int64_t kLeastPooled = 8;
  const double row_operations = 2.0 * static_cast<double>(S * S * C * K * OW);
  const int64_t fitting = static_cast<int64_t>(kItemOperations / row_operations);
  const int64_t rows = std::clamp<int64_t>(pool ? std::max(fitting / 2, kLeastPooled) : fitting, 1, height);
  const int64_t runs = ceil_div(height, rows);
  float* out = y.mutable_data_ptr<float>();
  const Kernels& run = kernels_for(K);
  in_order(N * runs, [&](int64_t item) {
    thread_local std::vector<float> padded, whole;
    const int64_t n = item / runs, begin = item % runs * rows, end = std::min(begin + rows, height);
    const int64_t first = pool ? std::max<int64_t>(2 * begin - 1, 0) : begin, last = pool ? std::min(2 * end, OH) : end;
    const int64_t from = first * stride - padding, to = from + (last - first - 1) * stride + S;
    padded.resize(std::max<size_t>(padded.size(), static_cast<size_t>((to - from) * line)));
    pad_rows(x, n, padding, from, to, padded.data());
    float* const result = out + (n * height + begin) * width * K;
    if (!pool) return run.stem_rows(conv, padded.data(), static_cast<int>(last - first), result);
    whole.resize(std::max<size_t>(whole.size(), static_cast<size_t>((last - first) * OW * K)));
    run.stem_rows(conv, padded.data(), static_cast<int>(last - first), whole.data());
    for (int64_t row = begin; row < end; ++row) {
      pool_row(whole.data(), first, row, OH, OW, K, result + (row - begin) * width * K);
    }
  });
  return y;
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) { m.impl("packed_stem", TORCH_BOX(&gatedkernels::packed_stem)); }
