// The first convolution of a network, and its pooling, from images of any layout to NHWC pixels.
#include <algorithm>

#include "stem.h"

namespace gatedkernels {
namespace {

int64_t pooled(int64_t length) { return (length - 1) / 2 + 1; }

int64_t scratch_for(const StemConv& conv, int64_t rows) { return StemTable(conv).scratch(conv, rows); }
int64_t scratch_for(const StemConvOf<Bf16>&, int64_t) { return 0; }  // has no tiles

// The kernels for float32, of images of K output channels, or for bfloat16.
template <class Element>
struct StemKernels {
  void (*rows)(const StemConvOf<Element>&, const Element* padded, int rows, Element* y);
  void (*max_pixels)(const Element* const* pixels, int count, int64_t C, Element* y);
  void (*tiles)(const StemConvOf<Element>&, const Element* padded, int rows, float* scratch, Element* y) = nullptr;
};

template <class Element>
const Element* elements(const Tensor& t) {
  return static_cast<const Element*>(t.const_data_ptr());
}

// Rows of one image with their padding, which may lie above and below the image; NHWC.
template <class Element>
void pad_rows(const Tensor& x, int64_t sample, int64_t padding, int64_t from, int64_t to, Element* padded) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const Element* image = elements<Element>(x) + sample * x.stride(0);
  for (int64_t y = from; y < to; ++y) {
    Element* const end = padded + (W + 2 * padding) * C;
    if (y < 0 || y >= H) {
      padded = std::fill_n(padded, end - padded, Element{});
      continue;
    }
    padded = std::fill_n(padded, padding * C, Element{});
    const Element* row = image + y * sh;
    if (sc == 1 && sw == C) {
      padded = std::copy_n(row, W * C, padded);
    } else {
      for (int64_t c = 0; c < C; ++c) {
        Element* pixel = padded + c;
        for (int64_t w = 0; w < W; ++w, pixel += C) *pixel = row[w * sw + c * sc];
      }
      padded += W * C;
    }
    padded = std::fill_n(padded, end - padded, Element{});
  }
}

// Pixels of pooling by 3 x 3 windows of stride 2 and padding 1: output row `row` of an image of OH x OW pixels, of
// which `conv` holds the rows from `first` on.
template <class Element>
void pool_row(const StemKernels<Element>& run, const Element* conv, int64_t first, int64_t row, int64_t OH, int64_t OW,
              int64_t K, Element* y) {
  for (int64_t column = 0; column < pooled(OW); ++column, y += K) {
    const Element* pixels[9];
    int count = 0;
    for (int64_t r = std::max<int64_t>(2 * row - 1, 0); r <= std::min(2 * row + 1, OH - 1); ++r) {
      for (int64_t c = std::max<int64_t>(2 * column - 1, 0); c <= std::min(2 * column + 1, OW - 1); ++c) {
        pixels[count++] = conv + ((r - first) * OW + c) * K;
      }
    }
    run.max_pixels(pixels, count, K, y);
  }
}

// With `run.tiles`, from the transformed weights that `weight` then is.
template <class Element>
Tensor run_stem(const StemKernels<Element>& run, const Tensor& x, const Element* weight, int64_t S, const Tensor& bias,
                int64_t stride, int64_t padding, bool relu, bool pool) {
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), K = bias.size(0);
  const int64_t OH = (H + 2 * padding - S) / stride + 1, OW = (W + 2 * padding - S) / stride + 1;
  const int64_t height = pool ? pooled(OH) : OH, width = pool ? pooled(OW) : OW;
  Tensor y = empty({N, K, height, width}, x.scalar_type(), MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const int64_t line = (W + 2 * padding) * C;
  const StemConvOf<Element> conv{static_cast<int>(C),
                                 static_cast<int>(K),
                                 static_cast<int>(S),
                                 static_cast<int>(stride),
                                 static_cast<int>(OW),
                                 line,
                                 weight,
                                 elements<Element>(bias),
                                 relu};
  // Items are about the usual size, but pooled ones compute a row twice where they meet, and should seldom.
  constexpr int64_t kLeastPooled = 8;
  const double row_operations = 0.5 * sizeof(Element) * static_cast<double>(S * S * C * K * OW);
  const int64_t fitting = static_cast<int64_t>(kItemOperations / row_operations);
  int64_t rows = std::clamp<int64_t>(pool ? std::max(fitting / 2, kLeastPooled) : fitting, 1, height);
  // As many for each thread, where there are few.
  if (N == 1) rows = ceil_div(height, ceil_div(ceil_div(height, rows), threads()) * threads());
  const int64_t runs = ceil_div(height, rows);
  Element* out = static_cast<Element*>(y.mutable_data_ptr());
  in_order(N * runs, [&](int64_t item) {
    thread_local std::vector<Element> padded, whole;
    thread_local std::vector<float> scratch;
    const int64_t n = item / runs, begin = item % runs * rows, end = std::min(begin + rows, height);
    const int64_t first = pool ? std::max<int64_t>(2 * begin - 1, 0) : begin, last = pool ? std::min(2 * end, OH) : end;
    const int64_t from = first * stride - padding, to = from + (last - first - 1) * stride + S;
    padded.resize(std::max<size_t>(padded.size(), static_cast<size_t>((to - from) * line)));
    pad_rows<Element>(x, n, padding, from, to, padded.data());
    auto convolve = [&](Element* to) {
      const int many = static_cast<int>(last - first);
      if (!run.tiles) return run.rows(conv, padded.data(), many, to);
      scratch.resize(std::max<size_t>(scratch.size(), static_cast<size_t>(scratch_for(conv, many))));
      run.tiles(conv, padded.data(), many, scratch.data(), to);
    };
    Element* const result = out + (n * height + begin) * width * K;
    if (!pool) return convolve(result);
    whole.resize(std::max<size_t>(whole.size(), static_cast<size_t>((last - first) * OW * K)));
    convolve(whole.data());
    for (int64_t row = begin; row < end; ++row) {
      pool_row(run, whole.data(), first, row, OH, OW, K, result + (row - begin) * width * K);
    }
  });
  return y;
}

}  // namespace

// With `pool`, pooled as torchvision's ResNets are; what is pooled never leaves the cache.
Tensor packed_stem(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                   bool relu, bool pool, const MaybeTensor& tiles) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && x.is_cpu(), "x is (N, C, H, W) on the CPU, weight is packed");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type() && x.scalar_type() == bias.scalar_type(),
                  "x, weight and bias share a dtype");
  STD_TORCH_CHECK(weight.is_contiguous() && weight.size(0) == ceil_div(bias.size(0), kBlock) &&
                      weight.size(2) == weight.size(1) * x.size(1) && weight.size(3) == kBlock && bias.is_contiguous(),
                  "weight is packed as (K / 32, S, S * C, 32)");
  STD_TORCH_CHECK(std::min(x.size(2), x.size(3)) + 2 * padding >= weight.size(1),
                  "the window fits into the padded image");
  const int64_t side = weight.size(1);
  if (x.scalar_type() == ScalarType::BFloat16) {
    if (const Bf16Kernels* run = bf16_kernels()) {
      return run_stem<Bf16>({run->stem_rows, run->max_pixels}, x, bf16s(weight), side, bias, stride, padding, relu,
                            pool);
    }
    auto wide = [](const Tensor& t) { return converted(t, ScalarType::Float); };
    return converted(packed_stem(wide(x), wide(weight), wide(bias), stride, padding, relu, pool), ScalarType::BFloat16);
  }
  check_float(x, 4);
  STD_TORCH_CHECK(!tiles || (side == 7 && stride == 2 && tiles->is_contiguous() &&
                             tiles->numel() == weight.size(0) * StemTable::kComponents * 14 * x.size(1) * kBlock),
                  "tiles is packed as (K / 32, 6, 7, 2 C, 32), for a window of 7 and a stride of 2");
  const Kernels& run = kernels_for(bias.size(0));
  // Rows of one or two tiles, mostly of zeros, cost more than they save, digits too.
  constexpr int64_t kLeastWidth = 3 * StemTable::kPixels;
  if (!tiles || (x.size(3) + 2 * padding - side) / stride + 1 < kLeastWidth) {
    return run_stem<float>({run.stem_rows, run.max_pixels}, x, floats(weight), side, bias, stride, padding, relu, pool);
  }
  return run_stem<float>({run.stem_rows, run.max_pixels, run.stem_tiles}, x, floats(*tiles), side, bias, stride,
                         padding, relu, pool);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) { m.impl("packed_stem", TORCH_BOX(&gatedkernels::packed_stem)); }
