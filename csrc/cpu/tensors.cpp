#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace gatedkernels {

Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype, MemoryFormat format) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Bool ||
                      dtype == ScalarType::Int,
                  "no other dtypes are made here");
  const int64_t* sizes = size.begin();
  const auto dims = static_cast<int64_t>(size.size());
  std::vector<int64_t> strides(size.size());
  int64_t step = 1;
  if (format == MemoryFormat::ChannelsLast) {
    for (const int64_t d : {1, 3, 2, 0}) strides[d] = step, step *= sizes[d];
  } else {
    for (int64_t d = dims - 1; d >= 0; --d) strides[d] = step, step *= std::max<int64_t>(sizes[d], 1);
  }
  const int32_t type = dtype == ScalarType::Float      ? kDtypeCodes.float32
                       : dtype == ScalarType::BFloat16 ? kDtypeCodes.bfloat16
                       : dtype == ScalarType::Bool     ? kDtypeCodes.boolean
                                                       : kDtypeCodes.int32;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

namespace {

const Tensor& decisions(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_cpu(), "masks are bool, on the CPU");
  return mask;
}

}  // namespace

Plan::Plan(const Tensor& mask)
    : Plan(row_major(decisions(mask)).const_data_ptr<bool>(), mask.size(0), mask.size(1)) {}

Plan::Plan(const bool* from, int64_t samples_, int64_t channels_) : samples(samples_), channels(channels_) {
  own_index.resize(samples * channels);
  own_count.resize(samples);
  for (int64_t n = 0; n < samples; ++n, from += channels) {
    int32_t* list = own_index.data() + n * channels;
    int32_t active = 0;
    for (int64_t c = 0; c < channels; ++c) {
      list[active] = static_cast<int32_t>(c);
      active += from[c];
    }
    own_count[n] = active;
  }
  index = own_index.data();
  count = own_count.data();
}

Plan::Plan(const Tensor& given_index, const Tensor& given_count, int64_t samples_, int64_t channels_)
    : samples(samples_), channels(channels_) {
  const Tensor i = row_major(given_index), c = row_major(given_count);
  own_index.assign(i.const_data_ptr<int32_t>(), i.const_data_ptr<int32_t>() + i.numel());
  own_count.assign(c.const_data_ptr<int32_t>(), c.const_data_ptr<int32_t>() + c.numel());
  index = own_index.data();
  count = own_count.data();
  for (int64_t n = 0; n < samples; ++n) {
    STD_TORCH_CHECK(0 <= count[n] && count[n] <= channels, "count must lie between 0 and the number of channels");
    STD_TORCH_CHECK(std::all_of(list(n), list(n) + count[n], [&](int32_t at) { return 0 <= at && at < channels; }),
                    "index must name channels");
  }
}

Plan::Plan(const Tensor& width, int64_t samples_, int64_t channels_)
    : samples(samples_), channels(channels_), index(nullptr) {
  const bool wide = width.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((wide || width.scalar_type() == ScalarType::Int) && width.is_cpu() && width.dim() == 1 &&
                      width.size(0) == samples,
                  "widths are int32 or int64, one for every sample, on the CPU");
  const Tensor packed = row_major(width);
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t given = wide ? packed.const_data_ptr<int64_t>()[n] : packed.const_data_ptr<int32_t>()[n];
    own_count.push_back(static_cast<int32_t>(std::clamp<int64_t>(given, 0, channels)));
  }
  count = own_count.data();
}

int64_t Plan::position(int64_t sample, int64_t channel, int64_t unit) const {
  if (channel >= channels) return count[sample];
  const int32_t *first = list(sample), *last = first + count[sample];
  return (std::lower_bound(first, last, channel) - first) / unit * unit;
}

int64_t Plan::most() const { return samples ? *std::max_element(count, count + samples) : 0; }

std::vector<int32_t> Plan::uses() const {
  std::vector<int32_t> times(channels, 0);
  for (int64_t n = 0; n < samples; ++n) {
    const int32_t* active = list(n);
    for (int32_t j = 0; j < count[n]; ++j) ++times[active ? active[j] : j];
  }
  return times;
}

Geometry geometry(const Tensor& x, int64_t taps, int64_t stride) {
  Geometry g;
  g.H = static_cast<int>(x.size(2));
  g.W = static_cast<int>(x.size(3));
  g.S = static_cast<int>(taps);
  g.stride = static_cast<int>(stride);
  g.OH = (g.H - 1) / g.stride + 1;
  g.OW = (g.W - 1) / g.stride + 1;
  return g;
}

namespace {

// Pieces of so many floats that a thread copies at least, where waking another one would take longer than that.
int64_t grain_of(int64_t piece) {
  constexpr int64_t kFloats = 1 << 14;  // a few microseconds
  return ceil_div(kFloats, std::max<int64_t>(piece, 1));
}

// Where to pack so many floats. Memory of the allocator takes time, which counts where little is computed; memory that
// is kept for this alone is not in the caches as often, which counts where there is much of it.
float* room(Kept& kept, int64_t floats, Tensor& memory) {
  constexpr int64_t kSmall = 1 << 16;
  if (floats <= kSmall) return kept.reserve(floats);
  memory = empty({floats});
  return memory.mutable_data_ptr<float>();
}

}  // namespace

PackedWeights weight_rows(const Tensor& weight, const Plan& plan) {
  const int64_t K = weight.size(0), C = weight.size(1), S = weight.size(2), T = weight.size(3);
  const float* from = floats(weight);
  if (is_channels_last(weight)) return {from, Tensor()};
  const std::vector<int32_t> used = plan.uses();
  static thread_local Kept kept;
  Tensor memory;
  float* const to = room(kept, K * C * S * T, memory);
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  torch::stable::parallel_for(0, K, grain_of(C * S * T), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (!used[k]) continue;
      for (int64_t t = 0; t < S * T; ++t) {
        const float* filter = from + k * sk + t / T * sr + t % T * ss;
        float* row = to + (k * S * T + t) * C;
        for (int64_t c = 0; c < C; ++c) row[c] = filter[c * sc];
      }
    }
  });
  return {to, std::move(memory)};
}

namespace {

constexpr int64_t kTogether = 16;  // channels that are packed at a time

// Channels [first, last) of the kBlock filters from k on, whose rows in memory run along the channels or the taps, to
// rows of kBlock: transposed in registers.
void transpose_filters(const Tensor& weight, int64_t k, int64_t first, int64_t last, float* to) {
  const int64_t taps = weight.size(2) * weight.size(3), T = weight.size(3), sc = weight.stride(1);
  const float* rows[kBlock];
  const auto point = [&](int64_t offset) {
    for (int64_t l = 0; l < kBlock; ++l) rows[l] = floats(weight) + (k + l) * weight.stride(0) + offset;
  };
  if (sc == taps) {
    point(first * sc);
    kernels().gather_rows(rows, (last - first) * taps, to);
    return;
  }
  float tap[kTogether * kBlock];
  for (int64_t t = 0; t < taps; ++t) {
    point(first + t / T * weight.stride(2) + t % T * weight.stride(3));
    kernels().gather_rows(rows, last - first, tap);
    for (int64_t c = 0; c < last - first; ++c) {
      std::memcpy(to + (c * taps + t) * kBlock, tap + c * kBlock, kBlock * sizeof(float));
    }
  }
}

}  // namespace

PackedWeights weight_blocks(const Tensor& weight, const Plan* plan, int64_t most) {
  const int64_t K = std::min(weight.size(0), most), C = weight.size(1), S = weight.size(2), T = weight.size(3);
  const int64_t taps = S * T, blocks = ceil_div(K, kBlock), strips = ceil_div(C, kTogether);
  const std::vector<int32_t> used = plan ? plan->uses() : std::vector<int32_t>(C, 1);
  const float* from = floats(weight);
  static thread_local Kept kept;
  Tensor memory;
  float* const to = room(kept, blocks * C * taps * kBlock, memory);
  const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const bool in_rows = sc == 1 || (sc == taps && sr == T && ss == 1);
  // Filter by filter, some channels at a time: reads run along the filter, writes stay in the first-level cache.
  torch::stable::parallel_for(0, blocks * strips, grain_of(kBlock * kTogether * taps), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / strips, first = i % strips * kTogether, last = std::min(first + kTogether, C);
      const int64_t open = std::count_if(used.begin() + first, used.begin() + last, std::identity());
      if (open == 0) continue;
      const bool whole = open == last - first && (block + 1) * kBlock <= K;
      if (in_rows && whole) {
        transpose_filters(weight, block * kBlock, first, last, to + (block * C + first) * taps * kBlock);
        continue;
      }
      for (int64_t l = 0; l < kBlock; ++l) {
        const int64_t k = block * kBlock + l;
        for (int64_t c = first; c < last; ++c) {
          if (!used[c]) continue;
          float* row = to + (block * C + c) * taps * kBlock + l;
          const float* filter = from + k * sk + c * sc;
          for (int64_t t = 0; t < taps; ++t) row[t * kBlock] = k < K ? filter[t / T * sr + t % T * ss] : 0.0f;
        }
      }
    }
  });
  return {to, std::move(memory)};
}

InConv in_conv(const Tensor& x, const Geometry& size, const float* blocks, const float* bias, int64_t out_channels,
               bool gathered, bool relu) {
  InConv conv;
  conv.size = size;
  conv.C = static_cast<int>(x.size(1));
  conv.K = static_cast<int>(out_channels);
  conv.weight = blocks;
  conv.bias = bias;
  conv.channel_step = x.stride(1);
  conv.row_step = x.stride(2);
  conv.pixel_step = x.stride(3);
  conv.gathered = gathered;
  conv.relu = relu;
  return conv;
}

}  // namespace gatedkernels
