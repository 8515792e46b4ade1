// What the operations of the CPU library share: tensors in and out, threads, plans as plain lists.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels_bf16.h"
#include "cpu/schedule.h"
#include "kept.h"
#include "tensor.h"

namespace gatedkernels {

// By way of the C interface: an operator found by its name would take longer than many a small layer.
Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float,
             MemoryFormat format = MemoryFormat::Contiguous);

inline const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
inline const float* floats(const MaybeTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

inline const Bf16* bf16s(const Tensor& t) { return static_cast<const Bf16*>(t.const_data_ptr()); }
inline const Bf16* bf16s(const MaybeTensor& t) { return t ? bf16s(*t) : nullptr; }

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : library_to(t, dtype);
}

inline Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : library_contiguous(t); }
inline MaybeTensor row_major(const MaybeTensor& t) { return t ? MaybeTensor(row_major(*t)) : std::nullopt; }

// Whether images, or filters, lie in memory as (N, H, W, C), whatever the strides of sizes of one.
bool is_channels_last(const Tensor& t);
// The layout of a result, a function of the shape and strides of x alone: channels-last if x is that and nothing else.
MemoryFormat layout_like(const Tensor& x);
Tensor in_layout(Tensor images, MemoryFormat format);
inline Tensor channels_last(Tensor t) { return in_layout(std::move(t), MemoryFormat::ChannelsLast); }
inline MaybeTensor channels_last(const MaybeTensor& t) { return t ? MaybeTensor(channels_last(*t)) : std::nullopt; }

// Columns [begin, end) of (rows, columns) become rows, `step` floats apart: cache line by cache line of either side.
void transpose(const float* from, float* to, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t step);

inline void check_float(const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == dims && t.is_cpu(),
                  "the CPU kernels take float32 tensors on the CPU");
}

// Work of about 10 microseconds: long against the queue, short against the end of a region where a thread has no more.
constexpr double kItemOperations = 1e6;

inline int64_t threads() { return torch::stable::get_num_threads(); }

template <class Item>
void in_order(int64_t total, const Item& item) {
  auto parallel = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  };
  run_in_order(total, threads(), parallel, item);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The active channels of every sample, and how many they are. A sample's width is a plan without a list: its active
// channels are the first ones, 0, 1, …, count - 1, which null lists stand for everywhere.
struct Plan {
  int64_t samples, channels;
  std::vector<int32_t> own_index, own_count;
  const int32_t *index, *count;

  explicit Plan(const Tensor& mask);                                            // bool (N, C)
  Plan(const bool* open, int64_t samples, int64_t channels);
  Plan(const Tensor& index, const Tensor& count, int64_t samples, int64_t channels);  // as `plan` returns them
  Plan(const Tensor& width, int64_t samples, int64_t channels);                       // int32 or int64 (N,)

  const int32_t* list(int64_t sample) const { return index ? index + sample * channels : nullptr; }
  // Where in a sample's list the channels from `channel` on begin, in whole register tiles of `unit` channels: slices
  // of weights that end in the middle of one would leave lanes of it without work.
  int64_t position(int64_t sample, int64_t channel, int64_t unit) const;
  int64_t most() const;               // active channels of the widest sample
  std::vector<int32_t> uses() const;  // by how many samples each channel is active
};

Geometry geometry(const Tensor& x, int64_t taps, int64_t stride);

// Weights in the two layouts of kernels.h, made from (K, C, S, S) of any strides, filled in where the plan has active
// channels: output channels of rows, input channels of blocks (all, without a plan). They lie in the weights
// themselves, in memory that the calling thread keeps until its next call, or in memory of their own.
struct PackedWeights {
  const float* floats;
  Tensor memory;
};
PackedWeights weight_rows(const Tensor& weight, const Plan& plan);  // (K, S, S, C)
// (K / kBlock, C, S, S, kBlock), of the first `most` output channels
PackedWeights weight_blocks(const Tensor& weight, const Plan* plan, int64_t most = INT64_MAX);

InConv in_conv(const Tensor& x, const Geometry& size, const float* blocks, const float* bias, int64_t out_channels,
               bool gathered, bool relu);

}  // namespace gatedkernels
