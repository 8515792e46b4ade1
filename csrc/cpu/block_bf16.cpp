// The gated basic block in bfloat16: as block.cpp does it, with sums in float32 and a hidden activation of bfloat16
// pairs. Processors without these products compute it in float32.
#include <algorithm>
#include <numeric>

#include "block.h"
#include "conv.h"
#include "queue.h"
#include "strips.h"

namespace gatedkernels {
namespace {

constexpr int64_t kCacheBytes = 1 << 19;        // weights, or components, that stay in a core's second-level cache
constexpr int64_t kFarBytes = 12 << 20;         // weights that do not stay in the last-level cache, beside others'
constexpr double kSpeedUp = 2;                  // over float32, whose operations the queue counts in

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

// When tiles pay, by the cycles of a core that they take (Zen 4: a multiplication of 16 pairs each), and direct
// kernels.

// To compute a pair of channels' components, which every thread does `redone` times: rows of tiles take vectors of 16,
// 8 or 4, the last two overlapping.
double transform_cycles(const TileGrid& grid, int64_t redone) {
  const int vector = grid.columns >= 16 ? 16 : grid.columns >= 8 ? 8 : 4;
  const double each = vector == 16 ? 120 : vector == 8 ? 75 : 60;
  return static_cast<double>(redone) *
         (each * static_cast<double>(grid.rows * ceil_div(grid.columns, vector)) + 2.0 * grid.tiles());
}

bool out_pairs_pay(const TileGrid& grid, int32_t count, int C, int64_t redone) {
  if (grid.size.stride != 1 || grid.tiles() < kLeastTiles) return false;
  constexpr double kDirect = 1.1, kFinish = 60.0 / 16;
  const int over = grid.tiles() % 16, lanes = grid.tiles() - over + (over == 0 ? 0 : over <= 8 ? 8 : 16);
  const double each = lanes == 16 ? 1.5 : 1;  // a weight is loaded for a single vector of tiles
  const double direct = kDirect * C / 2 * count * taps_inside(grid.size) / 16;
  return C / 2.0 * (each * count * lanes + transform_cycles(grid, redone)) + kFinish * count * grid.tiles() < direct;
}

bool in_pairs_pay(const TileGrid& grid, int32_t count, int K, int64_t samples, int64_t redone) {
  if (grid.tiles() < kLeastTiles) return false;
  constexpr double kTiles = 1.1;
  const double finish = far_images(samples, int64_t{grid.size.OH} * grid.size.OW * K) ? 120 : 90;
  const double pairs = count / 2.0, vectors = K / 16.0, direct = vectors * pairs * taps_inside(grid.size);
  return vectors * (16 * kTiles * pairs + finish) * grid.tiles() + pairs * transform_cycles(grid, redone) < direct;
}

// Tensors as the operators take them, checked.
struct Given {
  const Tensor &x, &weight1, &bias1, &weight2, &bias2;
  const MaybeTensor &tiles1, &tiles2, &residual, &shortcut_weight, &shortcut_bias;
};

class PairBlock {
 public:
  PairBlock(const Bf16Kernels& run, const Given& given, const Tensor& x, const MaybeTensor& residual, Tensor& y,
            const Plan& plan, int64_t stride)
      : run_(run),
        plan_(plan),
        N_(x.size(0)),
        hidden_(plan.channels),
        grid1_(geometry(x, 3, stride)),
        grid2_(geometry(y, 3, 1)),
        strips1_(grid1_, N_, std::max<int64_t>(kCacheBytes / (32 * x.size(1)) / 16 * 16, 16)),
        strips2_(grid2_, N_, 64),
        x_(bf16s(x)),
        residual_(bf16s(residual)),
        y_(static_cast<Bf16*>(y.mutable_data_ptr())),
        planes_(plan, y.size(2) * y.size(3)),
        tiled1_(N_),
        tiled2_(N_) {
    conv1_ = {grid1_.size, static_cast<int>(x.size(1)), bf16s(given.weight1), bf16s(given.bias1), planes_.pitch, true};
    conv2_.size = grid2_.size, conv2_.C = static_cast<int>(hidden_), conv2_.K = static_cast<int>(y.size(1));
    conv2_.weight = bf16s(given.weight2), conv2_.bias = bf16s(given.bias2);
    conv2_.channel_step = planes_.pitch, conv2_.row_step = 2 * y.size(3), conv2_.pixel_step = 2;
    conv2_.gathered = false, conv2_.relu = true;
    // Threads take turns in the queue: what comes after the own item is that of another thread.
    if (N_ == 1) conv1_.turns = conv2_.turns = static_cast<int>(threads());
    tiles1_ = conv1_, tiles1_.weight = bf16s(given.tiles1);
    tiles2_ = conv2_, tiles2_.weight = bf16s(given.tiles2);
    // As in block.cpp: transformed weights that come from memory may cost a sample or two more than they save, those of
    // the first convolution, which are read for a single vector of tiles each.
    const bool far = 32 * hidden_ * (conv1_.C + conv2_.K) > kFarBytes && N_ < 4;
    for (int64_t n = 0; n < N_; ++n) {
      const int32_t count = plan.count[n];
      tiled1_[n] = (!far || 2 * count >= hidden_) && tiles1_.weight && conv1_.C % 2 == 0 &&
                   out_pairs_pay(grid1_, count, conv1_.C, redone(out_parts(count)));
      tiled2_[n] = tiles2_.weight && in_pairs_pay(grid2_, count, conv2_.K, N_, redone(in_parts()));
    }
    if (given.shortcut_weight) add_shortcut(given, x, y, stride);
  }

  void run() {
    run_queue(
        cut(), [&](const Item& item) { item.stage == Stage::shortcut ? run_shortcut(item) : run_conv1(item); },
        [&](const Item& item) { run_conv2(item); });
  }

 private:
  void add_shortcut(const Given& given, const Tensor& x, const Tensor& y, int64_t stride) {
    shortcut_.size = geometry(x, 1, stride), shortcut_.C = conv1_.C, shortcut_.K = conv2_.K;
    shortcut_.weight = bf16s(given.shortcut_weight), shortcut_.bias = bf16s(given.shortcut_bias);
    shortcut_.channel_step = 2, shortcut_.pixel_step = conv1_.C;
    shortcut_.row_step = int64_t{conv1_.size.W} * conv1_.C;
    shortcut_.gathered = shortcut_.relu = false;
    skip_memory_ = empty({N_, y.size(1), y.size(2), y.size(3)}, ScalarType::BFloat16);
    residual_ = skip_ = static_cast<Bf16*>(skip_memory_->mutable_data_ptr());
  }

  // Into how many parts the channels of a strip are cut, and how many threads transform it anew for that.
  int64_t out_parts(int32_t count) const { return strips1_.parts(ceil_div(count, 2), 4); }
  int64_t in_parts() const { return strips2_.parts(ceil_div(conv2_.K, kBlock), 1); }
  static int64_t redone(int64_t parts) { return std::min(parts, threads()); }

  // As in block.cpp, but that pairs of active channels stay together.
  Queue cut() const {
    const int64_t blocks = ceil_div(conv2_.K, kBlock);
    // Weights that exceed the cache are walked in slices, and a group of samples passes by each of them.
    const int64_t filter_bytes = 9 * conv1_.C * static_cast<int64_t>(sizeof(Bf16));
    const int64_t image_bytes = int64_t{conv1_.C} * conv1_.size.H * conv1_.size.W * static_cast<int64_t>(sizeof(Bf16));
    const bool sliced = hidden_ * filter_bytes > 2 * kCacheBytes, whole = hidden_ * filter_bytes > image_bytes;
    const int64_t slice = sliced ? std::max<int64_t>(kCacheBytes / filter_bytes, 8) : hidden_;
    const int64_t group = sliced ? 16 : threads(), together = run_.channels_together(conv1_.size.OW);
    const int64_t tile = std::lcm(together, 2);
    const double row1 = 18.0 * conv1_.C * conv1_.size.OW / kSpeedUp, row2 = 18.0 * kBlock * conv2_.size.OW / kSpeedUp;
    double operations = 0;
    for (int64_t n = 0; n < N_; ++n) {
      operations += plan_.count[n] * conv1_.size.OH * (row1 + row2 * static_cast<double>(blocks));
    }
    Queue queue(N_, conv1_.size.OH, operations);
    std::vector<int64_t> reached(N_, 0);  // how far a sample's list is cut
    for (int64_t begin = 0; begin < N_; begin += group) {
      const int64_t end = std::min(begin + group, N_);
      for (int64_t n = begin; n < end && skip_; ++n) {
        queue.add_rows(n, Stage::shortcut, 0, blocks, 1, row2 * static_cast<double>(conv1_.C) / 9, whole);
      }
      for (int64_t n = begin; n < end; ++n) {
        for (int i = 0; i < strips1_.count && tiled1_[n]; ++i) {
          queue.add_tiles(n, Stage::out_tiles, ceil_div(plan_.count[n], 2), out_parts(plan_.count[n]), strips1_.at(i));
        }
      }
      for (int64_t c = 0; c < hidden_; c += slice) {
        for (int64_t n = begin; n < end; ++n) {
          if (tiled1_[n]) continue;
          const int64_t next = plan_.position(n, c + slice, tile);
          queue.add_rows(n, Stage::out_rows, reached[n], next, together, row1, whole);
          reached[n] = next;
        }
      }
      for (int64_t n = begin; n < end; ++n) {
        for (int i = 0; i < strips2_.count && tiled2_[n]; ++i) {
          queue.add_tiles(n, Stage::in_tiles, blocks, in_parts(), strips2_.at(i));
        }
      }
      for (int64_t block = 0; block < blocks; block += sliced ? 1 : blocks) {
        for (int64_t n = begin; n < end; ++n) {
          if (tiled2_[n]) continue;
          queue.add_rows(n, Stage::in_rows, block, sliced ? block + 1 : blocks, 1, row2 * std::max(plan_.count[n], 1),
                         whole);
        }
      }
    }
    return queue;
  }

  const Bf16* image(int64_t n) const { return x_ + n * conv1_.size.H * conv1_.size.W * conv1_.C; }

  void run_shortcut(const Item& item) const {
    run_.in_rows(shortcut_, image(item.sample), nullptr, shortcut_.C, item.from, item.to, item.begin, item.end, nullptr,
                 skip_ + item.sample * conv2_.size.H * conv2_.size.W * conv2_.K);
  }

  void run_conv1(const Item& item) {
    const int64_t n = item.sample;
    const int32_t count = plan_.count[n];
    if (item.stage == Stage::out_rows) {
      run_.out_rows(conv1_, image(n), plan_.list(n) + item.from, item.to - item.from, count - item.from, item.begin,
                    item.end, planes_.of(n) + item.from / 2 * planes_.pitch);
      return;
    }
    const Strip strip{item.begin, item.end};
    const int64_t pairs = conv1_.C / 2;
    ThreadTiles& mine = ThreadTiles::mine();
    mine.reserve(Components::floats(pairs, strips1_.widest()), tile_scratch(grid1_, strips1_.widest()));
    const Components components(mine.components, pairs, strip.tiles());
    if (mine.lacks(call_, item.stage, item.sample, strip)) {
      run_.image_tiles(grid1_, strip, image(n), conv1_.C, components, mine.scratch);
    }
    const int32_t from = 2 * item.from, to = std::min(2 * item.to, count);
    run_.out_tiles(tiles1_, grid1_, strip, components, plan_.list(n) + from, to - from, count - from,
                   planes_.of(n) + item.from * planes_.pitch, mine.scratch);
  }

  void run_conv2(const Item& item) {
    const int64_t n = item.sample, at = n * conv2_.size.H * conv2_.size.W * conv2_.K;
    const int32_t *channels = plan_.list(n), count = plan_.count[n];
    const Bf16* residual = residual_ ? residual_ + at : nullptr;
    if (item.stage == Stage::in_rows) {
      run_.in_rows(conv2_, planes_.of(n), channels, count, item.from, item.to, item.begin, item.end, residual, y_ + at);
      return;
    }
    const Strip strip{item.begin, item.end};
    const int32_t pairs = (count + 1) / 2;
    ThreadTiles& mine = ThreadTiles::mine();
    mine.reserve(Components::floats((hidden_ + 1) / 2, strips2_.widest()), tile_scratch(grid2_, strips2_.widest()));
    const Components components(mine.components, pairs, strip.tiles());
    if (mine.lacks(call_, item.stage, item.sample, strip)) {
      run_.plane_tiles(grid2_, strip, planes_.of(n), planes_.pitch, pairs, components, mine.scratch);
    }
    run_.in_tiles(tiles2_, grid2_, strip, components, channels, count, item.from, item.to, residual, y_ + at,
                  mine.scratch);
  }

  const Bf16Kernels& run_;
  const Plan& plan_;
  int64_t N_, hidden_;
  TileGrid grid1_, grid2_;
  Strips strips1_, strips2_;
  const Bf16 *x_, *residual_;
  Bf16 *y_, *skip_ = nullptr;  // what the shortcut writes, if there is one
  PairPlanes planes_;
  OutConvOf<Bf16> conv1_, tiles1_;  // the same convolution, with weights for rows and for tiles
  InConvOf<Bf16> conv2_, tiles2_, shortcut_;
  MaybeTensor skip_memory_;
  std::vector<uint8_t> tiled1_, tiled2_;  // whether a sample's convolution is computed on tiles
  const uint64_t call_ = next_call();
};

Tensor in_float32(const Given& given, const Plan& plan, int64_t stride) {
  auto wide = [](const Tensor& t) { return converted(t, ScalarType::Float); };
  auto maybe = [&](const MaybeTensor& t) { return t ? MaybeTensor(wide(*t)) : t; };
  return converted(block_and_shortcut(wide(given.x), wide(given.weight1), wide(given.bias1), wide(given.weight2),
                                      wide(given.bias2), std::nullopt, std::nullopt, plan, maybe(given.residual),
                                      maybe(given.shortcut_weight), maybe(given.shortcut_bias), stride),
                   ScalarType::BFloat16);
}

}  // namespace

Tensor block_and_shortcut_bf16(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                               const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2,
                               const Plan& plan, const MaybeTensor& residual, const MaybeTensor& shortcut_weight,
                               const MaybeTensor& shortcut_bias, int64_t stride) {
  const Given given{x, weight1, bias1, weight2, bias2, tiles1, tiles2, residual, shortcut_weight, shortcut_bias};
  for (const MaybeTensor& t : {MaybeTensor(x), MaybeTensor(weight1), MaybeTensor(bias1), MaybeTensor(weight2),
                               MaybeTensor(bias2), tiles1, tiles2, residual, shortcut_weight, shortcut_bias}) {
    STD_TORCH_CHECK(!t || (t->scalar_type() == ScalarType::BFloat16 && t->is_cpu()),
                    "x, weights and residual share a dtype");
  }
  const Bf16Kernels* run = bf16_kernels();
  if (!run || (shortcut_weight && x.size(1) % 2)) return in_float32(given, plan, stride);
  const Tensor images = channels_last(x);
  const MaybeTensor skip = channels_last(residual);
  const Geometry size = geometry(x, 3, stride);
  Tensor y = empty({x.size(0), bias2.size(0), size.OH, size.OW}, ScalarType::BFloat16, MemoryFormat::ChannelsLast);
  if (y.numel()) PairBlock(*run, given, images, skip, y, plan, stride).run();
  return y;
}

}  // namespace gatedkernels
