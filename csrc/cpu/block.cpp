// The gated basic block in one parallel region: conv1's active channels go into packed planes, conv2 reads them there.
//
// The queue holds, for every sample, the items of conv1 and then those of conv2, which wait for conv1 of their sample;
// the samples overlap, so that nobody waits while there is other work.
#include <algorithm>
#include <memory>

#include "tensors.h"

namespace gatedkernels {
namespace {

// How the rows (and, of conv1, the channels) of one sample are cut into items.
struct Cut {
  int64_t channels = 1, rows = 1, items = 0;

  // `operations` for one channel and row; `tile` channels are best done together.
  Cut(int64_t count, int64_t tile, int64_t height, double operations, int64_t least_items) {
    if (count == 0) return;
    const double work = operations * static_cast<double>(count * height);
    const double target = std::min(kItemOperations, work / static_cast<double>(least_items));
    const double wanted = target / (operations * static_cast<double>(tile));  // rows of one tile of channels
    rows = std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, height);
    if (rows > 1) rows -= rows % 2;  // narrow images are computed in pairs of rows
    channels = tile * (rows < height ? 1 : std::max<int64_t>(1, static_cast<int64_t>(wanted) / height));
    items = ceil_div(count, channels) * ceil_div(height, rows);
  }
};

struct Segment {
  int64_t begin;
  int64_t sample;
  bool second;
};

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

  const OutConv conv1{size1, static_cast<int>(C), rows1, bias1, plane, true};
  InConv conv2;
  conv2.size = size2, conv2.C = static_cast<int>(hidden_channels), conv2.K = static_cast<int>(out_channels);
  conv2.weight = blocks2, conv2.bias = bias2;
  conv2.channel_step = plane, conv2.row_step = size2.W, conv2.pixel_step = 1;
  conv2.gathered = false, conv2.relu = true;

  const int64_t least = N >= 4 * threads() ? 1 : ceil_div(8 * threads(), N);
  const int64_t blocks = ceil_div(out_channels, kBlock);
  std::vector<Cut> first, second;
  first.reserve(N), second.reserve(N);
  auto left = std::make_unique<std::atomic<int64_t>[]>(N);
  for (int64_t n = 0; n < N; ++n) {
    const double width = size1.OW;
    first.emplace_back(plan.count[n], 3, size1.OH, 18.0 * static_cast<double>(C) * width, least);
    second.emplace_back(blocks, 1, size2.OH, 18.0 * kBlock * width * std::max(plan.count[n], 1), least);
    left[n].store(first[n].items, std::memory_order_relaxed);
  }

  const int64_t lead = std::min<int64_t>(N, threads());  // samples whose conv1 comes before the first conv2
  std::vector<Segment> segments;
  int64_t total = 0;
  auto add = [&](int64_t n, bool is_second) {
    segments.push_back({total, n, is_second});
    total += (is_second ? second : first)[n].items;
  };
  for (int64_t n = 0; n < N + lead; ++n) {
    if (n < N) add(n, false);
    if (n >= lead) add(n - lead, true);
  }

  const float* in = floats(x);
  const float* skip = floats(residual);
  float* out = y.mutable_data_ptr<float>();
  const Kernels& run = kernels();
  in_order(total, [&](int64_t item) {
    const auto next = std::upper_bound(segments.begin(), segments.end(), item,
                                       [](int64_t at, const Segment& segment) { return at < segment.begin; });
    const Segment& segment = *(next - 1);
    const int64_t n = segment.sample, at = item - segment.begin;
    const int32_t* channels = plan.list(n);
    const Cut& cut = (segment.second ? second : first)[n];
    const int64_t bands = ceil_div(size1.OH, cut.rows);
    const int row = static_cast<int>(at % bands * cut.rows);
    const int end = static_cast<int>(std::min<int64_t>(row + cut.rows, size1.OH));
    if (!segment.second) {
      const int64_t j = at / bands * cut.channels;
      const int64_t many = std::min<int64_t>(cut.channels, plan.count[n] - j);
      run.out_rows(conv1, in + n * size1.H * size1.W * C, channels + j, static_cast<int>(many), row, end,
                   planes + offset[n] + j * plane);
      left[n].fetch_sub(1, std::memory_order_release);
    } else {
      wait_until([&] { return left[n].load(std::memory_order_acquire) == 0; });
      const int64_t from = at / bands * cut.channels, to = std::min(from + cut.channels, blocks);
      const int64_t image = n * pixels * out_channels;
      for (int64_t block = from; block < to; ++block) {
        run.in_rows(conv2, planes + offset[n], channels, plan.count[n], static_cast<int>(block), row, end,
                    skip ? skip + image : nullptr, out + image);
      }
    }
  });
  return y;
}

Tensor packed_block(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride) {
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 5);
  STD_TORCH_CHECK(weight1.is_contiguous() && weight2.is_contiguous() && bias1.is_contiguous() && bias2.is_contiguous(),
                  "packed weights are contiguous");
  const int64_t hidden = weight1.size(0), out = bias2.size(0);
  STD_TORCH_CHECK(weight1.size(1) == 3 && weight1.size(3) == x.size(1), "weight1 is packed as (M, 3, 3, C)");
  STD_TORCH_CHECK(weight2.size(0) == ceil_div(out, kBlock) && weight2.size(1) == hidden && weight2.size(2) == 3,
                  "weight2 is packed as (K / 32, M, 3, 3, 32)");
  STD_TORCH_CHECK(mask.size(0) == x.size(0) && mask.size(1) == hidden, "mask has shape (N, M)");
  return run_block(x, floats(weight1), floats(bias1), floats(weight2), floats(bias2), hidden, out, Plan(mask),
                   residual, stride);
}

Tensor gated_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                   const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride) {
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 4);
  const Tensor rows1 = weight_rows(weight1), blocks2 = weight_blocks(weight2);
  const MaybeTensor b1 = row_major(bias1), b2 = row_major(bias2);
  return run_block(x, floats(rows1), floats(b1), floats(blocks2), floats(b2), weight1.size(0), weight2.size(0),
                   Plan(mask), residual, stride);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("packed_block", TORCH_BOX(&gatedkernels::packed_block));
  m.impl("gated_block_cpu", TORCH_BOX(&gatedkernels::gated_block));
}
