// The gated basic block in bfloat16: as block.cpp does it, with sums in float32 and a hidden activation of bfloat16
// pairs. Processors without these products compute it in float32.
#include <algorithm>
#include <memory>

#include "block.h"
#include "queue.h"
#include "tensors.h"

namespace gatedkernels {
namespace {

constexpr int64_t kCacheBytes = 1 << 19;  // weights that stay in a core's second-level cache while samples pass by
constexpr double kSpeedUp = 2;  // over float32, whose operations the queue counts in

// The planes of a sample's active channels, two in each, and where every sample's begin.
struct PairPlanes {
  int64_t pitch;
  std::vector<int64_t> offset;
  Tensor memory;

  PairPlanes(const Plan& plan, int64_t pixels)
      // Planes a power of two apart would fall into the same cache sets: keep them a cache line off.
      : pitch(2 * (ceil_div(pixels, 16) * 16 + 16)), offset(plan.samples + 1, 0), memory(allocate(plan)) {}

  Bf16* of(int64_t sample) { return static_cast<Bf16*>(memory.mutable_data_ptr()) + offset[sample]; }

 private:
  Tensor allocate(const Plan& plan) {
    for (int64_t n = 0; n < plan.samples; ++n) offset[n + 1] = offset[n] + ceil_div(plan.count[n], 2) * pitch;
    return empty({std::max<int64_t>(offset[plan.samples], 1)}, ScalarType::BFloat16);
  }
};

// What there is to do, cut into items; as in block.cpp, but that pairs of active channels stay together.
Queue cut(const OutConvOf<Bf16>& conv1, const InConvOf<Bf16>& conv2, const Plan& plan, int64_t together) {
  const int64_t N = plan.samples, hidden = conv2.C, blocks = ceil_div(conv2.K, kBlock);
  // Weights that exceed the cache are walked in slices, and a group of samples passes by each of them.
  const int64_t filter_bytes = 9 * conv1.C * static_cast<int64_t>(sizeof(Bf16));
  const int64_t image_bytes = int64_t{conv1.C} * conv1.size.H * conv1.size.W * static_cast<int64_t>(sizeof(Bf16));
  const bool sliced = hidden * filter_bytes > 2 * kCacheBytes, whole = hidden * filter_bytes > image_bytes;
  const int64_t slice = sliced ? std::max<int64_t>(kCacheBytes / filter_bytes, 8) : hidden;
  const int64_t group = sliced ? 16 : threads();
  const double row1 = 18.0 * conv1.C * conv1.size.OW / kSpeedUp, row2 = 18.0 * kBlock * conv2.size.OW / kSpeedUp;
  double operations = 0;
  for (int64_t n = 0; n < N; ++n) {
    operations += plan.count[n] * conv1.size.OH * (row1 + row2 * static_cast<double>(blocks));
  }
  Queue queue(N, conv1.size.OH, operations);
  for (int64_t begin = 0; begin < N; begin += group) {
    const int64_t end = std::min(begin + group, N);
    for (int64_t c = 0; c < hidden; c += slice) {
      for (int64_t n = begin; n < end; ++n) {
        const int32_t *list = plan.list(n), *last = list + plan.count[n];
        auto position = [&](int64_t channel) {
          return channel < hidden ? (std::lower_bound(list, last, channel) - list) / 2 * 2 : plan.count[n];
        };
        queue.add_rows(n, Stage::out_rows, position(c), position(c + slice), together, row1, whole);
      }
    }
    for (int64_t block = 0; block < blocks; block += sliced ? 1 : blocks) {
      for (int64_t n = begin; n < end; ++n) {
        queue.add_rows(n, Stage::in_rows, block, sliced ? block + 1 : blocks, 1, row2 * std::max(plan.count[n], 1),
                       whole);
      }
    }
  }
  return queue;
}

Tensor run_block(const Bf16Kernels& run, const Tensor& given_x, const Tensor& weight1, const Tensor& bias1,
                 const Tensor& weight2, const Tensor& bias2, const Plan& plan, const MaybeTensor& given_residual,
                 int64_t stride) {
  const Tensor x = channels_last(given_x);
  const MaybeTensor residual = given_residual ? MaybeTensor(channels_last(*given_residual)) : given_residual;
  const Geometry size1 = geometry(x, 3, stride);
  const int64_t N = x.size(0), C = x.size(1), K = bias2.size(0), pixels = int64_t{size1.OH} * size1.OW;
  Geometry size2 = size1;
  size2.H = size1.OH, size2.W = size1.OW, size2.stride = 1;
  Tensor y = empty({N, K, size1.OH, size1.OW}, ScalarType::BFloat16, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;

  PairPlanes planes(plan, pixels);
  OutConvOf<Bf16> conv1{size1, static_cast<int>(C), bf16s(weight1), bf16s(bias1), planes.pitch, true};
  InConvOf<Bf16> conv2;
  conv2.size = size2, conv2.C = static_cast<int>(plan.channels), conv2.K = static_cast<int>(K);
  conv2.weight = bf16s(weight2), conv2.bias = bf16s(bias2);
  conv2.channel_step = planes.pitch, conv2.row_step = 2 * size2.W, conv2.pixel_step = 2;
  conv2.gathered = false, conv2.relu = true;
  // Threads take turns in the queue: what comes after the own item is that of another thread.
  if (N == 1) conv1.turns = conv2.turns = static_cast<int>(threads());
  const Queue queue = cut(conv1, conv2, plan, run.channels_together(size1.OW));
  auto left = std::make_unique<std::atomic<int32_t>[]>(N);
  for (int64_t n = 0; n < N; ++n) left[n].store(queue.pending[n], std::memory_order_relaxed);

  const Bf16* in = bf16s(x);
  const Bf16* skip = bf16s(residual);
  Bf16* out = static_cast<Bf16*>(y.mutable_data_ptr());
  in_order(static_cast<int64_t>(queue.items.size()), [&](int64_t at) {
    const Item& item = queue.items[at];
    const int64_t n = item.sample;
    const int32_t* channels = plan.list(n);
    if (before_conv2(item.stage)) {
      run.out_rows(conv1, in + n * size1.H * size1.W * C, channels + item.from, item.to - item.from,
                   plan.count[n] - item.from, item.begin, item.end, planes.of(n) + item.from / 2 * planes.pitch);
      left[n].fetch_sub(1, std::memory_order_release);
      return;
    }
    wait_until([&] { return left[n].load(std::memory_order_acquire) == 0; });
    const int64_t image = n * pixels * K;
    run.in_rows(conv2, planes.of(n), channels, plan.count[n], item.from, item.to, item.begin, item.end,
                skip ? skip + image : nullptr, out + image);
  });
  return y;
}

}  // namespace

Tensor packed_block_bf16(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                         const Tensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride) {
  for (const Tensor& t : {x, weight1, bias1, weight2, bias2, residual.value_or(x)}) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.is_cpu(), "x, weights and residual share a dtype");
  }
  if (const Bf16Kernels* run = bf16_kernels()) {
    return run_block(*run, x, weight1, bias1, weight2, bias2, Plan(mask), residual, stride);
  }
  auto wide = [](const Tensor& t) { return converted(t, ScalarType::Float); };
  const MaybeTensor skip = residual ? MaybeTensor(wide(*residual)) : residual;
  return converted(packed_block(wide(x), wide(weight1), wide(bias1), wide(weight2), wide(bias2), std::nullopt,
                                std::nullopt, mask, skip, stride),
                   ScalarType::BFloat16);
}

}  // namespace gatedkernels
