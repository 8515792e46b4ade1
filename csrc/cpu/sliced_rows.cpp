// Convolutions with a width for every sample by the out-gated kernel, of which a width is a plan without a list on
// either side: the first channels of a row of weights, and the first rows. Every item computes some output channels of
// all samples, so that their weights are fetched once for the batch, and turned, where they must be, in a cache.
#include "sliced_rows.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace gatedkernels {
namespace {

constexpr int64_t kTogether = 12;  // output channels of an item: whole tiles of every width

// Filters [from, to) of any strides as rows (S, S, C), of their first `most` channels.
void turn(const Tensor& weight, int64_t from, int64_t to, int64_t most, float* rows) {
  const int64_t C = weight.size(1), T = weight.size(3), taps = weight.size(2) * T;
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const float* filters = floats(weight) + from * sk;
  if (sc == taps && sr == T && ss == 1) {
    for (int64_t k = 0; k < to - from; ++k) transpose(filters + k * sk, rows + k * taps * C, most, taps, 0, taps, C);
    return;
  }
  // In this order for mirrored ones, whose input and output channels are exchanged: they lie side by side in memory.
  for (int64_t c = 0; c < most; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      const float* tap = filters + c * sc + t / T * sr + t % T * ss;
      for (int64_t k = 0; k < to - from; ++k) rows[(k * taps + t) * C + c] = tap[k * sk];
    }
  }
}

// Planes of the channels [from, active) become pixels of them, and zeros up to `to`.
void interleave(const float* planes, int64_t plane, int64_t pixels, int64_t from, int64_t active, int64_t to, int64_t K,
                float* y) {
  for (int64_t p = 0; p < pixels; ++p) {
    float* pixel = y + p * K;
    for (int64_t k = from; k < active; ++k) pixel[k] = planes[(k - from) * plane + p];
    for (int64_t k = active; k < to; ++k) pixel[k] = 0.0f;
  }
}

}  // namespace

Tensor sliced_on_rows(const Tensor& given_x, const Tensor& weight, const float* bias, const Plan* ins, const Plan* outs,
                      int64_t stride) {
  const Tensor x = channels_last(given_x);
  const Geometry size = geometry(x, weight.size(2), stride);
  const int64_t N = x.size(0), C = x.size(1), K = weight.size(0), pixels = int64_t{size.OH} * size.OW;
  Tensor y = empty({N, K, size.OH, size.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const int64_t filter = C * weight.size(2) * weight.size(3), plane = ceil_div(pixels, 16) * 16 + 16;
  const int64_t most = ins ? ins->most() : C, widest = outs ? outs->most() : K;
  const bool as_they_lie = is_channels_last(weight);
  const Kernels& run = kernels_for(C);
  float* const out = y.mutable_data_ptr<float>();
  std::array<int32_t, kTogether> channels;
  std::iota(channels.begin(), channels.end(), 0);
  // All samples in one run, but where there are too few channels for all threads.
  const int64_t groups = ceil_div(K, kTogether), runs = std::clamp<int64_t>(ceil_div(4 * threads(), groups), 1, N);
  in_order(groups * runs, [&](int64_t item) {
    static thread_local Kept kept;
    const int64_t from = item / runs * kTogether, to = std::min(from + kTogether, K), part = item % runs;
    float* const planes = kept.reserve(kTogether * (plane + filter));
    float* const turned = planes + kTogether * plane;
    const int64_t used = std::clamp(widest, from, to);
    if (!as_they_lie) turn(weight, from, used, most, turned);
    OutConv conv{size, static_cast<int>(C), as_they_lie ? floats(weight) + from * filter : turned,
                 bias ? bias + from : nullptr, plane, false};
    for (int64_t n = N * part / runs; n < N * (part + 1) / runs; ++n) {
      const int64_t active = outs ? std::clamp<int64_t>(outs->count[n], from, to) : to;
      const int count = static_cast<int>(active - from);
      if (ins) conv.inputs = ins->count[n];
      if (count > 0) {
        run.out_rows(conv, floats(x) + n * size.H * size.W * C, channels.data(), count, count, 0, size.OH, planes);
      }
      interleave(planes, plane, pixels, from, active, to, K, out + n * pixels * K);
    }
  });
  return y;
}

}  // namespace gatedkernels
