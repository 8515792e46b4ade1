// The packed convolution in bfloat16, of all channels: the neighbours in an NHWC image are the pairs that the in-gated
// kernel takes.
#include <algorithm>

#include "conv.h"

namespace gatedkernels {
namespace {

constexpr double kSpeedUp = 2;  // over float32, in which items are measured

Tensor run_pairs(const Bf16Kernels& run, const Tensor& x, const Tensor& weight, const Tensor& bias,
                 const MaybeTensor& residual, int64_t out_channels, int64_t stride, bool relu) {
  const int64_t N = x.size(0), C = x.size(1), K = out_channels, taps = weight.size(2), blocks = ceil_div(K, kBlock);
  const Geometry size = geometry(x, taps, stride);
  Tensor y = empty({N, K, size.OH, size.OW}, ScalarType::BFloat16, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  InConvOf<Bf16> conv;
  conv.size = size, conv.C = static_cast<int>(C), conv.K = static_cast<int>(K);
  conv.weight = bf16s(weight), conv.bias = bf16s(bias);
  conv.channel_step = 2, conv.pixel_step = C, conv.row_step = size.W * C;
  conv.gathered = false, conv.relu = relu;
  const double row = 2.0 * static_cast<double>(taps * taps * kBlock * size.OW * C) / kSpeedUp;
  const int64_t rows = band(size.OH, N * blocks, row), bands = ceil_div(size.OH, rows);
  const Bf16 *in = bf16s(x), *skip = bf16s(residual);
  Bf16* out = static_cast<Bf16*>(y.mutable_data_ptr());
  in_order(N * blocks * bands, [&](int64_t item) {
    const int64_t n = item / (blocks * bands), block = item / bands % blocks, begin = item % bands * rows;
    const int64_t image = n * size.OH * size.OW * K;
    run.in_rows(conv, in + n * size.H * size.W * C, nullptr, conv.C, static_cast<int>(block),
                static_cast<int>(block + 1), static_cast<int>(begin),
                static_cast<int>(std::min<int64_t>(begin + rows, size.OH)), skip ? skip + image : nullptr, out + image);
  });
  return y;
}

}  // namespace

Tensor packed_conv2d_bf16(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                          const MaybeTensor& out_mask, const MaybeTensor& residual, int64_t out_channels,
                          int64_t stride, bool relu) {
  for (const Tensor& t : {x, weight, bias, residual.value_or(x)}) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.is_cpu(),
                    "x, weight, bias and residual share a dtype");
  }
  const Bf16Kernels* run = bf16_kernels();
  if (run && x.size(1) % 2 == 0 && !in_mask && !out_mask) {
    const MaybeTensor skip = channels_last(residual);
    return run_pairs(*run, channels_last(x), weight, bias, skip, out_channels, stride, relu);
  }
  auto wide = [](const Tensor& t) { return converted(t, ScalarType::Float); };
  const MaybeTensor skip = residual ? MaybeTensor(wide(*residual)) : residual;
  return converted(
      packed_conv2d(wide(x), wide(weight), wide(bias), in_mask, out_mask, skip, out_channels, stride, relu),
      ScalarType::BFloat16);
}

}  // namespace gatedkernels
