// Single convolutions: out-gated into planes, in-gated or dense into NHWC pixels.
#include <algorithm>
#include <cstring>

#include "conv.h"
#include "dense.h"
#include "sliced_rows.h"
#include "sliced_tiles.h"

namespace gatedkernels {

int64_t band(int64_t height, int64_t pieces, double operations_a_row) {
  const int64_t few = static_cast<int64_t>(kItemOperations / std::max(operations_a_row, 1.0));
  const int64_t spread = ceil_div(height * pieces, 8 * threads());  // rows an item if work is short
  const int64_t rows = std::clamp<int64_t>(std::min(few, spread), 1, std::max<int64_t>(height, 1));
  return rows > 1 ? rows - rows % 2 : rows;
}

namespace {

// Writes NHWC pixels of all output channels; null plan: every input channel. With widths a sample's output channels
// beyond its own are zero, and whole blocks of them cost nothing else.
Tensor run_in(const Tensor& x, const float* blocks, const float* bias, int64_t out_channels, int64_t taps,
              const Plan* plan, bool gathered, const bool* out_mask, const MaybeTensor& residual, int64_t stride,
              bool relu, const Plan* out_width = nullptr) {
  const Geometry size = geometry(x, taps, stride);
  const int64_t N = x.size(0), K = out_channels, pixels = int64_t{size.OH} * size.OW;
  Tensor y = empty({N, K, size.OH, size.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const InConv conv = in_conv(x, size, blocks, bias, K, gathered, relu);
  const int64_t count_blocks = ceil_div(K, kBlock);
  const double operations = 2.0 * static_cast<double>(taps * taps * kBlock * size.OW * std::max<int64_t>(conv.C, 1));
  const int64_t rows = band(size.OH, N * count_blocks, operations), bands = ceil_div(size.OH, rows);
  const float* in = floats(x);
  const float* skip = floats(residual);
  float* out = y.mutable_data_ptr<float>();
  in_order(N * count_blocks * bands, [&](int64_t item) {
    const int64_t n = item / (count_blocks * bands), block = item / bands % count_blocks, row = item % bands * rows;
    const int64_t end = std::min<int64_t>(row + rows, size.OH), image = n * pixels * K;
    const int64_t from = block * kBlock, to = std::min<int64_t>(from + kBlock, K);
    const int64_t width = out_width ? std::clamp<int64_t>(out_width->count[n], from, to) : to;
    if (from < width) {
      kernels_for(K).in_rows(conv, in + n * x.stride(0), plan ? plan->list(n) : nullptr, plan ? plan->count[n] : conv.C,
                             static_cast<int>(block), static_cast<int>(block + 1), static_cast<int>(row),
                             static_cast<int>(end), skip ? skip + image : nullptr, out + image);
    }
    for (int64_t p = row * size.OW; width < to && p < end * size.OW; ++p) {
      std::memset(out + image + p * K + width, 0, (to - width) * sizeof(float));
    }
    if (!out_mask) return;
    for (int64_t p = row * size.OW; p < end * size.OW; ++p) {
      for (int64_t k = from; k < to; ++k) out[image + p * K + k] = out_mask[n * K + k] ? out[image + p * K + k] : 0.0f;
    }
  });
  return y;
}

}  // namespace

Tensor open_channels(const Tensor& x, const MaybeTensor& in_mask) {
  if (!in_mask) return channels_last(x);
  const Plan plan(*in_mask);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  Tensor y = empty({N, C, H, W}, ScalarType::Float, MemoryFormat::ChannelsLast);
  const float* from = floats(x);
  float* to = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, N * H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / H;
      const int32_t* channels = plan.list(n);
      for (int64_t w = 0; w < W; ++w) {
        float* pixel = to + (i * W + w) * C;
        std::memset(pixel, 0, C * sizeof(float));
        const float* source = from + n * x.stride(0) + i % H * x.stride(2) + w * x.stride(3);
        for (int32_t j = 0; j < plan.count[n]; ++j) pixel[channels[j]] = source[channels[j] * x.stride(1)];
      }
    }
  });
  return y;
}

Tensor out_gated(const Tensor& x, const float* rows, int64_t K, int64_t taps, const float* bias, const Plan& plan,
                 int64_t stride, MemoryFormat layout) {
  const Geometry size = geometry(x, taps, stride);
  const int64_t N = x.size(0), C = x.size(1), pixels = int64_t{size.OH} * size.OW;
  Tensor y = empty({N, K, size.OH, size.OW}, ScalarType::Float, layout);
  if (y.numel() == 0) return y;
  const double operations = 2.0 * static_cast<double>(taps * taps * C * size.OW * K);
  const int64_t height = band(size.OH, N, operations), bands = ceil_div(size.OH, height);
  const float* in = floats(x);
  float* out = y.mutable_data_ptr<float>();
  in_order(N * bands, [&](int64_t item) {
    const int64_t n = item / bands, row = item % bands * height, end = std::min<int64_t>(row + height, size.OH);
    const int64_t plane = ceil_div((end - row) * size.OW, 16) * 16 + 16;
    const OutConv conv{size, static_cast<int>(C), rows, bias, plane, false};
    const int32_t* channels = plan.list(n);
    // The kernel counts pixels from the image's first row; the planes hold this band only.
    std::vector<float> planes(plan.count[n] * plane);
    kernels_for(C).out_rows(conv, in + n * size.H * size.W * C, channels, plan.count[n], plan.count[n],
                            static_cast<int>(row), static_cast<int>(end), planes.data() - row * size.OW);
    const int64_t written = (end - row) * size.OW, from = row * size.OW;
    if (layout == MemoryFormat::Contiguous) {
      for (int64_t k = 0, j = 0; k < K; ++k) {
        float* to = out + (n * K + k) * pixels + from;
        if (j < plan.count[n] && channels[j] == k) {
          std::memcpy(to, planes.data() + j++ * plane, written * sizeof(float));
        } else {
          std::memset(to, 0, written * sizeof(float));
        }
      }
      return;
    }
    for (int64_t p = 0; p < written; ++p) {
      float* pixel = out + (n * pixels + from + p) * K;
      std::memset(pixel, 0, K * sizeof(float));
      for (int32_t j = 0; j < plan.count[n]; ++j) pixel[channels[j]] = planes[j * plane + p];
    }
  });
  return y;
}

Tensor conv_in(const Tensor& packed, const Tensor& weight, const MaybeTensor& bias, const Tensor& index,
               const Tensor& count, int64_t stride) {
  check_float(packed, 4), check_float(weight, 4);
  const Plan plan(index, count, packed.size(0), packed.size(1));
  const PackedWeights blocks = weight_blocks(weight, &plan);
  const MaybeTensor b = row_major(bias);
  return run_in(packed, blocks.floats, floats(b), weight.size(0), weight.size(2), &plan, false, nullptr, std::nullopt,
                stride, false);
}

Tensor conv_out(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const Tensor& index,
                const Tensor& count, int64_t stride, bool relu) {
  check_float(given_x, 4), check_float(weight, 4);
  const Tensor x = channels_last(given_x);
  const MaybeTensor b = row_major(bias);
  const int64_t N = x.size(0), C = x.size(1), K = weight.size(0);
  const Plan plan(index, count, N, K);
  const PackedWeights rows = weight_rows(weight, plan);
  const Geometry size = geometry(x, weight.size(2), stride);
  const int64_t plane = int64_t{size.OH} * size.OW;
  Tensor packed = empty({N, K, size.OH, size.OW});
  if (packed.numel() == 0) return packed;
  const OutConv conv{size, static_cast<int>(C), rows.floats, floats(b), plane, relu};
  const float* in = floats(x);
  float* out = packed.mutable_data_ptr<float>();
  constexpr int64_t kTile = 12;  // channels of one item: whole tiles of every width
  const int64_t pieces = ceil_div(K, kTile);
  in_order(N * pieces, [&](int64_t item) {
    const int64_t n = item / pieces, j = item % pieces * kTile, end = std::min(j + kTile, K);
    const int64_t active = std::clamp<int64_t>(plan.count[n], j, end);
    kernels_for(C).out_rows(conv, in + n * size.H * size.W * C, plan.list(n) + j, static_cast<int>(active - j),
                            static_cast<int>(active - j), 0, size.OH, out + (n * K + j) * plane);
    std::memset(out + (n * K + active) * plane, 0, (end - active) * plane * sizeof(float));
  });
  return packed;
}

Tensor gated_conv2d(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_mask,
                    const MaybeTensor& out_mask, double threshold, int64_t stride) {
  check_float(given_x, 4), check_float(weight, 4);
  const MemoryFormat layout = layout_like(given_x);
  if (too_dense(out_mask ? out_mask : in_mask, threshold)) {  // with both, work is saved by the output channels
    return dense_conv2d(given_x, weight, bias, in_mask, out_mask, stride, layout);
  }
  const MaybeTensor b = row_major(bias);
  const int64_t K = weight.size(0), taps = weight.size(2);
  if (!out_mask) {
    const std::optional<Plan> plan = in_mask ? std::optional<Plan>(*in_mask) : std::nullopt;
    const PackedWeights blocks = weight_blocks(weight, plan ? &*plan : nullptr);
    return in_layout(run_in(given_x, blocks.floats, floats(b), K, taps, plan ? &*plan : nullptr, true, nullptr,
                            std::nullopt, stride, false),
                     layout);
  }
  const Plan plan(*out_mask);
  const PackedWeights rows = weight_rows(weight, plan);
  return out_gated(open_channels(given_x, in_mask), rows.floats, K, taps, floats(b), plan, stride, layout);
}

Tensor sliced_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_width,
                     const MaybeTensor& out_width, int64_t stride) {
  check_float(x, 4), check_float(weight, 4);
  const MemoryFormat layout = layout_like(x);
  const MaybeTensor b = row_major(bias);
  const int64_t N = x.size(0), K = weight.size(0);
  const auto prefix = [&](const MaybeTensor& width, int64_t channels) {
    return width ? std::optional<Plan>(std::in_place, *width, N, channels) : std::nullopt;
  };
  const std::optional<Plan> all_ins = prefix(in_width, x.size(1)), all_outs = prefix(out_width, K);
  const Plan *ins = all_ins ? &*all_ins : nullptr, *outs = all_outs ? &*all_outs : nullptr;
  if (sliced_tiles_pay(x, weight, stride, ins, outs)) {
    const PackedWeights blocks = weight_blocks(weight, ins, outs ? outs->most() : K);
    return in_layout(sliced_on_tiles(x, blocks.floats, floats(b), K, ins, outs), layout);
  }
  // For so many output pixels of the batch packing the filters, for the faster kernel, pays; measured on Zen 4.
  constexpr int64_t kManyPixels = 2048;
  const Geometry size = geometry(x, weight.size(2), stride);
  if (N * size.OH * size.OW < kManyPixels) {
    return in_layout(sliced_on_rows(x, weight, floats(b), ins, outs, stride), layout);
  }
  const PackedWeights blocks = weight_blocks(weight, ins, outs ? outs->most() : K);
  return in_layout(run_in(x, blocks.floats, floats(b), K, weight.size(2), ins, false, nullptr, std::nullopt, stride,
                          false, outs),
                   layout);
}

Tensor packed_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, const MaybeTensor& in_mask,
                     const MaybeTensor& out_mask, const MaybeTensor& given_residual, int64_t out_channels,
                     int64_t stride, bool relu) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 5, "x is (N, C, H, W), weight is packed");
  const int64_t taps = weight.size(2);
  STD_TORCH_CHECK(weight.is_contiguous() && (taps == 1 || taps == 3) && weight.size(1) == x.size(1) &&
                      weight.size(0) == ceil_div(out_channels, kBlock) && bias.size(0) == out_channels,
                  "weight is packed as (K / 32, C, S, S, 32)");
  if (x.scalar_type() == ScalarType::BFloat16) {
    return packed_conv2d_bf16(x, weight, bias, in_mask, out_mask, given_residual, out_channels, stride, relu);
  }
  check_float(x, 4), check_float(weight, 5);
  const std::optional<Plan> plan = in_mask ? std::optional<Plan>(*in_mask) : std::nullopt;
  const MaybeTensor open = row_major(out_mask);
  const MaybeTensor residual = channels_last(given_residual);
  return run_in(x, floats(weight), floats(bias), out_channels, taps, plan ? &*plan : nullptr, true,
                open ? open->const_data_ptr<bool>() : nullptr, residual, stride, relu);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("conv_in_cpu", TORCH_BOX(&gatedkernels::conv_in));
  m.impl("conv_out_cpu", TORCH_BOX(&gatedkernels::conv_out));
  m.impl("gated_conv2d_cpu", TORCH_BOX(&gatedkernels::gated_conv2d));
  m.impl("sliced_conv2d_cpu", TORCH_BOX(&gatedkernels::sliced_conv2d));
  m.impl("packed_conv2d", TORCH_BOX(&gatedkernels::packed_conv2d));
}
