// The gated basic block in one parallel region: conv1's active channels go into packed planes, conv2 reads them there.
// Either convolution runs directly or on Winograd's components, sample by sample as their active channels make it pay.
#include <algorithm>

#include "block.h"
#include "conv.h"
#include "cpu/bring.h"
#include "dense.h"
#include "gradients.h"
#include "queue.h"
#include "strips.h"

namespace gatedkernels {
namespace {

constexpr int64_t kCacheBytes = 1 << 19;  // weights, or components, that stay in a core's second-level cache
constexpr int64_t kFarBytes = 24 << 20;    // weights that do not stay in the last-level cache

// Of one convolution, in the layouts of kernels.h.
struct Weights {
  const float* direct;
  const float* transformed;  // for tiles, or null
  const float* bias;
};

// A 1 x 1 convolution with the block's stride, whose result is added to the block's.
struct Shortcut {
  const float *weight, *bias;  // as `Weights::direct` of an in-gated convolution
  float* y;
};

class Block {
 public:
  Block(const Tensor& x, const MaybeTensor& residual, Tensor& y, const Weights& weights1, const Weights& weights2,
        int64_t hidden, int64_t stride, const Plan& plan, const MaybeTensor& kept, const Shortcut* shortcut)
      : plan_(plan),
        N_(x.size(0)),
        hidden_(hidden),
        grid1_(geometry(x, 3, stride)),
        grid2_(geometry(y, 3, 1)),
        strips1_(grid1_, N_, std::max<int64_t>(kCacheBytes / (64 * x.size(1)) / 16 * 16, 16)),
        strips2_(grid2_, N_, 64),
        x_(floats(x)),
        residual_(floats(residual)),
        y_(y.mutable_data_ptr<float>()),
        offset_(N_ + 1, 0),
        tiled1_(N_),
        tiled2_(N_) {
    const int64_t pixels = y.size(2) * y.size(3);
    const int64_t plane = Planes::pitch_of(pixels);
    conv1_ = {grid1_.size, static_cast<int>(x.size(1)), weights1.direct, weights1.bias, plane, true};
    conv2_.size = grid2_.size, conv2_.C = static_cast<int>(hidden), conv2_.K = static_cast<int>(y.size(1));
    conv2_.weight = weights2.direct, conv2_.bias = weights2.bias;
    conv2_.channel_step = plane, conv2_.row_step = y.size(3), conv2_.pixel_step = 1;
    conv2_.gathered = false, conv2_.relu = true;
    // Threads take turns in the queue: what comes after the own item is that of another thread.
    if (N_ == 1) conv1_.turns = conv2_.turns = static_cast<int>(threads());
    tiles1_ = conv1_, tiles1_.weight = weights1.transformed;
    tiles2_ = conv2_, tiles2_.weight = weights2.transformed;
    // Transformed weights are 16 / 9 as many. Where they come from memory, few samples share them and little is
    // computed with each, those of the first convolution cost more than they save.
    const bool far = 64 * hidden * (conv1_.C + conv2_.K) > kFarBytes && N_ < 4;
    for (int64_t n = 0; n < N_; ++n) {
      const int32_t count = plan.count[n];
      offset_[n + 1] = offset_[n] + (kept ? hidden : count) * plane;
      tiled1_[n] = (!far || 6 * count >= hidden) && weights1.transformed && out_tiles_pay(grid1_, count);
      tiled2_[n] = weights2.transformed && in_tiles_pay(grid2_, count, N_, pixels * conv2_.K);
    }
    if (shortcut) {
      shortcut_ = in_conv(x, geometry(x, 1, stride), shortcut->weight, shortcut->bias, conv2_.K, true, false);
      residual_ = skip_ = shortcut->y;
    }
    memory_ = kept ? *kept : empty({std::max<int64_t>(offset_[N_], 1)});
    planes_ = memory_.mutable_data_ptr<float>();
  }

  void run() {
    run_queue(
        schedule(), [&](const Item& item) { item.stage == Stage::shortcut ? run_shortcut(item) : run_conv1(item); },
        [&](const Item& item) { run_conv2(item); });
  }

 private:
  Queue schedule() const {
    const int64_t blocks = ceil_div(conv2_.K, kBlock), filter_bytes = 36 * int64_t{conv1_.C};
    // Weights that exceed the cache are walked in slices, and a group of samples passes by each of them.
    const bool sliced = hidden_ * filter_bytes > 2 * kCacheBytes;
    const int64_t slice = sliced ? std::max<int64_t>(kCacheBytes / filter_bytes, 8) : hidden_;
    const int64_t group = sliced ? 16 : threads();
    const bool whole = hidden_ * filter_bytes > 4 * int64_t{conv1_.C} * conv1_.size.H * conv1_.size.W;
    const double row1 = 18.0 * conv1_.C * conv1_.size.OW, row2 = 18.0 * kBlock * conv2_.size.OW;
    const int64_t together = kernels_for(conv1_.C).channels_together(conv1_.size.OW);
    double operations = 0;
    for (int64_t n = 0; n < N_; ++n) {
      operations += plan_.count[n] * conv2_.size.H * (row1 + row2 * static_cast<double>(blocks));
    }
    Queue queue(N_, conv2_.size.H, operations);
    std::vector<int64_t> reached(N_, 0);  // how far a sample's list is cut
    for (int64_t begin = 0; begin < N_; begin += group) {
      const int64_t end = std::min(begin + group, N_);
      for (int64_t n = begin; n < end && skip_; ++n) {
        queue.add_rows(n, Stage::shortcut, 0, blocks, 1, 2.0 * conv1_.C * kBlock * conv2_.size.OW, whole);
      }
      for (int64_t n = begin; n < end; ++n) {
        if (!tiled1_[n]) continue;
        for (int i = 0; i < strips1_.count; ++i) {
          queue.add_tiles(n, Stage::out_tiles, plan_.count[n], strips1_.parts(plan_.count[n], 8), strips1_.at(i));
        }
      }
      for (int64_t c = 0; c < hidden_; c += slice) {
        for (int64_t n = begin; n < end; ++n) {
          if (tiled1_[n]) continue;
          const int64_t next = plan_.position(n, c + slice, together);
          queue.add_rows(n, Stage::out_rows, reached[n], next, together, row1, whole);
          reached[n] = next;
        }
      }
      for (int64_t n = begin; n < end; ++n) {
        if (!tiled2_[n]) continue;
        for (int i = 0; i < strips2_.count; ++i) {
          queue.add_tiles(n, Stage::in_tiles, blocks, strips2_.parts(blocks, 1), strips2_.at(i));
        }
      }
      for (int64_t block = 0; block < blocks; block += sliced ? 1 : blocks) {
        for (int64_t n = begin; n < end; ++n) {
          if (tiled2_[n]) continue;
          queue.add_rows(n, Stage::in_rows, block, sliced ? block + 1 : blocks, 1,
                         row2 * std::max(plan_.count[n], 1), whole);
        }
      }
    }
    return queue;
  }

  // The kernels fetch ahead from the second tile or block on; the first find nothing if nobody does it for them.
  static void bring_rows(const float* weight, int64_t row, const int32_t* channels, int32_t count) {
    constexpr int64_t kFloats = 1 << 14;
    const int64_t many = std::min<int64_t>(count, ceil_div(kFloats, row));
    for (int64_t j = 0; j < many; ++j) bring(weight + channels[j] * row, row);
  }

  void run_shortcut(const Item& item) const {
    const int64_t n = item.sample, pixels = int64_t{conv2_.size.H} * conv2_.size.W;
    kernels_for(conv2_.K).in_rows(shortcut_, x_ + n * conv1_.size.H * conv1_.size.W * conv1_.C, nullptr, shortcut_.C,
                                  item.from, item.to, item.begin, item.end, nullptr, skip_ + n * pixels * conv2_.K);
  }

  void run_conv1(const Item& item) const {
    const Kernels& run = kernels_for(conv1_.C);
    const int64_t n = item.sample;
    const int32_t* channels = plan_.list(n) + item.from;
    const int32_t count = item.to - item.from;
    const float* in = x_ + n * conv1_.size.H * conv1_.size.W * conv1_.C;
    float* planes = planes_ + offset_[n] + item.from * conv1_.plane;
    const bool on_rows = item.stage == Stage::out_rows;
    if (on_rows) {
      bring_rows(conv1_.weight, 9 * int64_t{conv1_.C}, channels, count);
      run.out_rows(conv1_, in, channels, count, plan_.count[n] - item.from, item.begin, item.end, planes);
      return;
    }
    const Strip strip{item.begin, item.end};
    ThreadTiles& mine = ThreadTiles::mine();
    mine.reserve(Components::floats(conv1_.C, strips1_.widest()), tile_scratch(grid1_, strips1_.widest()));
    const Components components(mine.components, conv1_.C, strip.tiles());
    const int64_t row = 16 * int64_t{conv1_.C} + 16;
    if (mine.lacks(call_, item.stage, item.sample, strip)) {
      // The weights of the first register tile come behind the transform, a share with every piece of it.
      constexpr int kPiece = 32, kFirst = 9;
      for (int from = 0; from < conv1_.C; from += kPiece) {
        const int to = std::min(from + kPiece, conv1_.C);
        const int64_t begin = row * from / conv1_.C, many = row * to / conv1_.C - begin;
        for (int j = 0; j < std::min(count, kFirst); ++j) bring(tiles1_.weight + channels[j] * row + begin, many);
        run.image_tiles(grid1_, strip, in, conv1_.C, from, to, components, mine.scratch);
      }
    } else {
      bring_rows(tiles1_.weight, row, channels, count);
    }
    run.out_tiles(tiles1_, grid1_, strip, components, channels, count, plan_.count[n] - item.from, planes,
                  mine.scratch);
  }

  void run_conv2(const Item& item) const {
    const Kernels& run = kernels_for(conv2_.K);
    const int64_t n = item.sample, image = n * conv2_.size.H * conv2_.size.W * conv2_.K;
    const int32_t *channels = plan_.list(n), count = plan_.count[n];
    const float *planes = planes_ + offset_[n], *residual = residual_ ? residual_ + image : nullptr;
    const bool on_rows = item.stage == Stage::in_rows;
    const int64_t row = on_rows ? 9 * kBlock : kTileRow, block = hidden_ * (on_rows ? row : 4 * row);
    bring_rows((on_rows ? conv2_.weight : tiles2_.weight) + item.from * block, row, channels, count);
    if (on_rows) {
      run.in_rows(conv2_, planes, channels, count, item.from, item.to, item.begin, item.end, residual, y_ + image);
      return;
    }
    const Strip strip{item.begin, item.end};
    ThreadTiles& mine = ThreadTiles::mine();
    mine.reserve(Components::floats(hidden_, strips2_.widest()), tile_scratch(grid2_, strips2_.widest()));
    const Components components(mine.components, count, strip.tiles());
    if (mine.lacks(call_, item.stage, item.sample, strip)) {
      run.plane_tiles(grid2_, strip, planes, conv1_.plane, 0, count, components, mine.scratch);
    }
    run.in_tiles(tiles2_, grid2_, strip, components, channels, count, item.from, item.to, residual, y_ + image,
                 mine.scratch);
  }

  const Plan& plan_;
  int64_t N_, hidden_;
  TileGrid grid1_, grid2_;
  Strips strips1_, strips2_;
  const float *x_, *residual_;
  float *y_, *skip_ = nullptr;  // what the shortcut writes, if there is one
  InConv shortcut_;
  OutConv conv1_, tiles1_;  // the same convolution, with weights for rows and for tiles
  InConv conv2_, tiles2_;
  std::vector<int64_t> offset_;           // of every sample's planes
  std::vector<uint8_t> tiled1_, tiled2_;  // whether a sample's convolution is computed on tiles
  Tensor memory_;
  float* planes_;
  const uint64_t call_ = next_call();
};

// kept: where the hidden activation's planes go, (N, hidden, pitch), if anybody wants them.
Tensor run_block(const Tensor& given_x, const Weights& weights1, const Weights& weights2, int64_t hidden,
                 int64_t out_channels, const Plan& plan, const MaybeTensor& given_residual, int64_t stride,
                 const MaybeTensor& kept = std::nullopt, const Shortcut* shortcut = nullptr) {
  const Tensor x = channels_last(given_x);
  const MaybeTensor residual = channels_last(given_residual);
  const Geometry size = geometry(x, 3, stride);
  Tensor y = empty({x.size(0), out_channels, size.OH, size.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (y.numel()) Block(x, residual, y, weights1, weights2, hidden, stride, plan, kept, shortcut).run();
  return y;
}

}  // namespace

Tensor packed_block(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                    const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2, const Tensor& mask,
                    const MaybeTensor& residual, int64_t stride) {
  return block_and_shortcut(x, weight1, bias1, weight2, bias2, tiles1, tiles2, Plan(mask), residual, std::nullopt,
                            std::nullopt, stride);
}

Tensor block_and_shortcut(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                          const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2, const Plan& plan,
                          const MaybeTensor& residual, const MaybeTensor& shortcut_weight,
                          const MaybeTensor& shortcut_bias, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && weight1.dim() == 4 && weight2.dim() == 5, "x is (N, C, H, W), weights are packed");
  STD_TORCH_CHECK(weight1.is_contiguous() && weight2.is_contiguous() && bias1.is_contiguous() && bias2.is_contiguous(),
                  "packed weights are contiguous");
  const int64_t hidden = weight1.size(0), out = bias2.size(0), C = x.size(1);
  STD_TORCH_CHECK(weight1.size(1) == 3 && weight1.size(3) == C, "weight1 is packed as (M, 3, 3, C)");
  STD_TORCH_CHECK(weight2.size(0) == ceil_div(out, kBlock) && weight2.size(1) == hidden && weight2.size(2) == 3,
                  "weight2 is packed as (K / 32, M, 3, 3, 32)");
  STD_TORCH_CHECK(!tiles1 || (tiles1->is_contiguous() && tiles1->numel() == hidden * (16 * C + 16)),
                  "tiles1 is packed as (M, 16 C + 16)");
  STD_TORCH_CHECK(!tiles2 || (tiles2->is_contiguous() &&
                              tiles2->numel() == ceil_div(out, kBlock) * 4 * hidden * kTileRow),
                  "tiles2 is packed as (K / 32, 4, M, 4 * 32)");
  STD_TORCH_CHECK(plan.samples == x.size(0) && plan.channels == hidden, "mask has shape (N, M)");
  const Geometry size = geometry(x, 3, stride);
  STD_TORCH_CHECK(!residual || (residual->size(0) == x.size(0) && residual->size(1) == out &&
                                residual->size(2) == size.OH && residual->size(3) == size.OW),
                  "the residual has the shape of the result");
  STD_TORCH_CHECK(!shortcut_weight ||
                      (shortcut_weight->is_contiguous() && shortcut_weight->dim() == 5 &&
                       shortcut_weight->size(0) == ceil_div(out, kBlock) && shortcut_weight->size(1) == C &&
                       shortcut_weight->size(2) == 1 && shortcut_bias->is_contiguous() &&
                       shortcut_bias->size(0) == out),
                  "the shortcut's weight is packed as (K / 32, C, 1, 1, 32)");
  if (x.scalar_type() == ScalarType::BFloat16) {
    return block_and_shortcut_bf16(x, weight1, bias1, weight2, bias2, tiles1, tiles2, plan, residual, shortcut_weight,
                                   shortcut_bias, stride);
  }
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 5);
  const Weights weights1{floats(weight1), floats(tiles1), floats(bias1)};
  const Weights weights2{floats(weight2), floats(tiles2), floats(bias2)};
  if (!shortcut_weight) return run_block(x, weights1, weights2, hidden, out, plan, residual, stride);
  Tensor skip = empty({x.size(0), out, size.OH, size.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  const Shortcut shortcut{floats(*shortcut_weight), floats(*shortcut_bias), skip.mutable_data_ptr<float>()};
  return run_block(x, weights1, weights2, hidden, out, plan, std::nullopt, stride, std::nullopt, &shortcut);
}

namespace {

Tensor functional_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                        const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, int64_t stride,
                        const MaybeTensor& kept) {
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 4);
  const Plan plan(mask);
  const PackedWeights rows1 = weight_rows(weight1, plan), blocks2 = weight_blocks(weight2, &plan);
  const MaybeTensor b1 = row_major(bias1), b2 = row_major(bias2);
  return run_block(x, {rows1.floats, nullptr, floats(b1)}, {blocks2.floats, nullptr, floats(b2)}, weight1.size(0),
                   weight2.size(0), plan, residual, stride, kept);
}

}  // namespace

Tensor gated_block(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
                   const MaybeTensor& bias2, const Tensor& mask, const MaybeTensor& residual, double threshold,
                   int64_t stride) {
  check_float(x, 4), check_float(weight1, 4), check_float(weight2, 4);
  const MemoryFormat layout = layout_like(x);
  if (too_dense(mask, threshold)) return dense_block(x, weight1, bias1, weight2, bias2, mask, residual, stride, layout);
  return in_layout(functional_block(x, weight1, bias1, weight2, bias2, mask, residual, stride, std::nullopt), layout);
}

std::tuple<Tensor, Tensor> gated_block_kept(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1,
                                            const Tensor& weight2, const MaybeTensor& bias2, const Tensor& mask,
                                            const MaybeTensor& residual, int64_t stride) {
  const Geometry size = geometry(x, 3, stride);
  const Tensor hidden = empty({x.size(0), weight1.size(0), Planes::pitch_of(int64_t{size.OH} * size.OW)});
  return {functional_block(x, weight1, bias1, weight2, bias2, mask, residual, stride, hidden), hidden};
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("packed_block", TORCH_BOX(&gatedkernels::packed_block));
  m.impl("gated_block_cpu", TORCH_BOX(&gatedkernels::gated_block));
  m.impl("gated_block_kept_cpu", TORCH_BOX(&gatedkernels::gated_block_kept));
}
