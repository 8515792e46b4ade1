// The gated basic block in one parallel region: conv1's active channels go into packed planes, conv2 reads them there.
#include <algorithm>
#include <memory>

#include "block.h"
#include "queue.h"
#include "tensors.h"

namespace gatedkernels {
namespace {

constexpr int64_t kCacheBytes = 1 << 19;  // weights that stay in a core's second-level cache while samples pass by

}  // namespace

Tensor run_block(const Tensor& given_x, const float* rows1, const float* bias1, const float* blocks2,
                 const float* bias2, int64_t hidden_channels, int64_t out_channels, const Plan& plan,
                 const MaybeTensor& given_residual, int64_t stride) {
  const Tensor x = channels_last(given_x);
  const MaybeTensor residual = given_residual ? MaybeTensor(channels_last(*given_residual)) : given_residual;
  const Geometry size1 = geometry(x, 3, stride);
  const int64_t N = x.size(0), C = x.size(1), pixels = int64_t{size1.OH} * size1.OW;
  Geometry size2 = size1;
  size2.H = size1.OH, size2.W = size1.OW, size2.stride = 1;
  Tensor y = empty({N, out_channels, size1.OH, size1.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;

  // Planes a power of two apart would fall into the same cache sets: keep them a cache line off.
  const int64_t plane = ceil_div(pixels, 16) * 16 + 16;
  std::vector<int64_t> offset(N + 1, 0);
  for (int64_t n = 0; n < N; ++n) offset[n + 1] = offset[n] + plan.count[n] * plane;
  Tensor scratch = empty({std::max<int64_t>(offset[N], 1)});
  float* planes = scratch.mutable_data_ptr<float>();

  OutConv conv1{size1, static_cast<int>(C), rows1, bias1, plane, true};
  InConv conv2;
  conv2.size = size2, conv2.C = static_cast<int>(hidden_channels), conv2.K = static_cast<int>(out_channels);
  conv2.weight = blocks2, conv2.bias = bias2;
  conv2.channel_step = plane, conv2.row_step = size2.W, conv2.pixel_step = 1;
  conv2.gathered = false, conv2.relu = true;

  // Weights that exceed the cache are walked in slices, and a group of samples passes by each of them.
  const int64_t blocks = ceil_div(out_channels, kBlock);
  const int64_t filter_bytes = 9 * C * static_cast<int64_t>(sizeof(float));
  const bool sliced = hidden_channels * filter_bytes > 2 * kCacheBytes;
  const int64_t slice = sliced ? std::max<int64_t>(kCacheBytes / filter_bytes, 8) : hidden_channels;
  const int64_t group = sliced ? 16 : threads();
  const double row_operations1 = 18.0 * static_cast<double>(C) * size1.OW;
  const double block_row_operations = 18.0 * kBlock * size2.OW;
  double operations = 0;
  for (int64_t n = 0; n < N; ++n) {
    operations += plan.count[n] * size1.OH * (row_operations1 + block_row_operations * static_cast<double>(blocks));
  }
  Queue queue(N, size1.OH, operations);
  const bool whole = hidden_channels * filter_bytes > C * size1.H * size1.W * static_cast<int64_t>(sizeof(float));
  auto add_first = [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < hidden_channels; c += slice) {
      for (int64_t n = begin; n < end; ++n) {
        const int32_t *list = plan.list(n), *last = list + plan.count[n];
        const int64_t from = std::lower_bound(list, last, c) - list, to = std::lower_bound(list, last, c + slice) - list;
        queue.add(n, false, from, to, 3, row_operations1, whole);
      }
    }
  };
  auto add_second = [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < blocks; block += sliced ? 1 : blocks) {
      for (int64_t n = begin; n < end; ++n) {
        queue.add(n, true, block, sliced ? block + 1 : blocks, 1, block_row_operations * std::max(plan.count[n], 1),
                  whole);
      }
    }
  };
  if (N == 1) {
    // Threads take turns in the queue: what comes after the own item is that of another thread.
    conv1.ahead = static_cast<int>(3 * threads());
    conv2.ahead = static_cast<int>(threads());
  }
  for (int64_t n = 0; n < N; n += group) {
    add_first(n, std::min(n + group, N));
    add_second(n, std::min(n + group, N));
  }
  auto left = std::make_unique<std::atomic<int32_t>[]>(N);
  for (int64_t n = 0; n < N; ++n) left[n].store(queue.pending[n], std::memory_order_relaxed);

  const float* in = floats(x);
  const float* skip = floats(residual);
  float* out = y.mutable_data_ptr<float>();
  const Kernels& run = kernels();
  in_order(static_cast<int64_t>(queue.items.size()), [&](int64_t at) {
    const Item& item = queue.items[at];
    const int64_t n = item.sample;
    const int32_t* channels = plan.list(n);
    if (!item.second) {
      run.out_rows(conv1, in + n * size1.H * size1.W * C, channels + item.from, item.to - item.from,
                   plan.count[n] - item.from, item.row, item.end, planes + offset[n] + item.from * plane);
      left[n].fetch_sub(1, std::memory_order_release);
      return;
    }
    wait_until([&] { return left[n].load(std::memory_order_acquire) == 0; });
    const int64_t image = n * pixels * out_channels;
    run.in_rows(conv2, planes + offset[n], channels, plan.count[n], item.from, item.to, item.row, item.end,
                skip ? skip + image : nullptr, out + image);
  });
  return y;
}

Tensor packed_block(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && weight1.dim() == 4 && weight2.dim() == 5, "x is (N, C, H, W), weights are packed");
  STD_TORCH_CHECK(weight1.is_contiguous() && weight2.is_contiguous() && bias1.is_contiguous() && bias2.is_contiguous(),
                  "packed weights are contiguous");
  const int64_t hidden = weight1.size(0), out = bias2.size(0);
  STD_TORCH_CHECK(weight1.size(1) == 3 && weight1.size(3) == x.size(1), "weight1 is packed as (M, 3, 3, C)");
  STD_TORCH_CHECK(weight2.size(0) == ceil_div(out, kBlock) && weight2.size(1) == hidden && weight2.size(2) == 3,
                  "weight2 is packed as (K / 32, M, 3, 3, 32)");
  STD_TORCH_CHECK(mask.size(0) == x.size(0) && mask.size(1) == hidden, "mask has shape (N, M)");
  if (x.scalar_type() == ScalarType::BFloat16) {
    return packed_block_bf16(x, weight1, bias1, weight2, bias2, mask, residual, stride);
  }
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 5);
  return run_block(x, floats(weight1), floats(bias1), floats(weight2), floats(bias2), hidden, out, Plan(mask),
                   residual, stride);
}

Tensor gated_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                   const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride) {
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 4);
  const Plan plan(mask);
  const Tensor rows1 = weight_rows(weight1, plan), blocks2 = weight_blocks(weight2, &plan);
  const MaybeTensor b1 = row_major(bias1), b2 = row_major(bias2);
  return run_block(x, floats(rows1), floats(b1), floats(blocks2), floats(b2), weight1.size(0), weight2.size(0),
                   plan, residual, stride);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("packed_block", TORCH_BOX(&gatedkernels::packed_block));
  m.impl("gated_block_cpu", TORCH_BOX(&gatedkernels::gated_block));
}
