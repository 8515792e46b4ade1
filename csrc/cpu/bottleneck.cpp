// A whole gated bottleneck as one operator, in one parallel region: the first gate decides, the 1 x 1 convolution
// leaves planes of its open channels and their sums, the second gate decides from these, the 3 x 3 convolution computes
// open channels from open channels, and the last one reads them where they lie.
// The middle convolution is the in-gated one with weights of fewer output channels, which every thread gathers for the
// sample and the block of channels that it is at: one vector moved for many that are multiplied.
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "bottleneck_gates.h"
#include "conv.h"
#include "cpu/vector.h"
#include "queue.h"

namespace gatedkernels {
namespace {

constexpr int64_t kLane = 16;  // gathered channels come in whole vectors

int64_t whole_lanes(int64_t channels) { return ceil_div(channels, kLane) * kLane; }

// The sum of a row of a plane, in an order of its own.
float row_sum(const float* row, int64_t width) {
  Quad sum = {};
  int64_t w = 0;
  for (; w + 4 <= width; w += 4) sum += load<4>(row + w);
  float rest = 0.0f;
  for (; w < width; ++w) rest += row[w];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]) + rest;
}

// The weights of a block of output channels that the calling thread gathered last.
class ThreadBlock {
 public:
  float *weight, *bias;

  static ThreadBlock& mine() {
    thread_local ThreadBlock block;
    return block;
  }

  // Whether they are not those of this sample's block yet; from now on they are.
  bool lacks(uint64_t call, int64_t sample, int64_t block, int64_t inputs) {
    bias = kept_.reserve(kBlock + inputs * 9 * kBlock);
    weight = bias + kBlock;
    return kept_.lacks({call, sample, block});
  }

 private:
  struct Key {
    uint64_t call;
    int64_t sample, block;
    bool operator==(const Key&) const = default;
  };

  KeptResult<Key> kept_;
};

// What is computed of a sample, each of it after all that stands before.
enum Step : uint8_t { kShortcut, kDecide1, kFirst, kDecide2, kMiddle, kLast, kSteps };

// Part `part` of `parts` of one step of a sample.
struct Piece {
  int32_t sample, part, parts;
  Step step;
};

class Bottleneck {
 public:
  // y may be x itself.
  Bottleneck(const BottleneckParts& parts, const Tensor& x, BottleneckGate& gate1, BottleneckGate& gate2,
             int64_t stride, const Tensor& y)
      : N_(x.size(0)),
        hidden_(parts.bias1->size(0)),
        gate1_(gate1),
        gate2_(gate2),
        x_(floats(x)),
        y_(y.mutable_data_ptr<float>()),
        has_shortcut_(*parts.shortcut_weight),
        together_(std::max<int64_t>(threads(), 2)),
        slots_(std::min(N_, 2 * together_)) {
    const Geometry in = geometry(x, 1, 1), middle = geometry(x, 3, stride);
    const Geometry out{middle.OH, middle.OW, middle.OH, middle.OW, 1, 1};
    const int64_t plane = ceil_div(int64_t{in.H} * in.W, kLane) * kLane + kLane;
    const int C = static_cast<int>(x.size(1)), inner = static_cast<int>(hidden_);
    conv1_ = {in, C, floats(*parts.weight1), floats(*parts.bias1), plane, true};
    conv2_ = {middle, inner, inner, floats(*parts.weight2), floats(*parts.bias2), plane, in.W, 1, false, true};
    conv3_ = {out, inner, static_cast<int>(y.size(1)), floats(*parts.weight3), floats(*parts.bias3), 1, 0, 0, false,
              true};
    if (has_shortcut_) {
      shortcut_ = in_conv(x, geometry(x, 1, stride), floats(*parts.shortcut_weight), floats(*parts.shortcut_bias),
                          conv3_.K, true, false);
      constexpr int64_t kFarBytes = 1 << 20;
      shared_shortcut_ = 4 * int64_t{C} * conv3_.K > kFarBytes;
    }
    planes_ = empty({slots_ * hidden_ * plane});
    pixels_ = empty({slots_ * out.H * out.W * whole_lanes(hidden_)});
    if (gate2.decider) sums_ = empty({slots_ * hidden_ * in.H});
  }

  void run() {
    schedule();
    left_ = std::make_unique<std::atomic<int32_t>[]>(N_ * kSteps);
    for (int64_t i = 0; i < N_ * kSteps; ++i) left_[i].store(0, std::memory_order_relaxed);
    for (const Piece& piece : queue_) left(piece.sample, piece.step).fetch_add(1, std::memory_order_relaxed);
    in_order(static_cast<int64_t>(queue_.size()), [&](int64_t at) {
      const Piece& piece = queue_[at];
      // The shortcut is waited for by what is added to it alone; planes and pixels lie where another sample's did.
      for (int step = kDecide1; step < piece.step; ++step) finish(piece.sample, step);
      if (piece.step == kLast) finish(shared_shortcut_ ? 0 : piece.sample, kShortcut);
      if (piece.step == kFirst && piece.sample >= slots_) finish(piece.sample - slots_, kLast);
      compute(piece);
      left(piece.sample, piece.step).fetch_sub(1, std::memory_order_release);
    });
  }

 private:
  static constexpr int kTaps = 9;

  std::atomic<int32_t>& left(int64_t n, int step) { return left_[n * kSteps + step]; }
  void finish(int64_t n, int step) {
    wait_until([&] { return left(n, step).load(std::memory_order_acquire) == 0; });
  }

  int64_t in_pixels() const { return int64_t{conv1_.size.H} * conv1_.size.W; }
  int64_t out_pixels() const { return int64_t{conv3_.size.H} * conv3_.size.W; }

  // Multiply-adds of a step, as far as they are known.
  double work(int64_t n, Step step) const {
    const auto inputs = static_cast<double>(gate1_.expected(n)), outputs = static_cast<double>(gate2_.expected(n));
    const auto in = static_cast<double>(in_pixels()), out = static_cast<double>(out_pixels());
    switch (step) {
      case kShortcut: return has_shortcut_ ? out * shortcut_.C * shortcut_.K : 0.0;
      case kFirst: return in * inputs * conv1_.C;
      case kMiddle: return out * inputs * outputs * kTaps;
      case kLast: return out * outputs * conv3_.K;
      default: return 0.0;
    }
  }

  void schedule() {
    constexpr double kLeast = 1e5, kMost = 4e6;
    double all = 0;
    for (int64_t n = 0; n < N_; ++n) {
      for (const Step step : {kShortcut, kFirst, kMiddle, kLast}) all += work(n, step);
    }
    const double target = std::clamp(all / static_cast<double>(24 * threads()), kLeast, kMost);
    if (shared_shortcut_) push(0, kShortcut, N_ * work(0, kShortcut) / target);
    for (int64_t begin = 0; begin < N_; begin += together_) {
      const int64_t end = std::min(begin + together_, N_);
      for (const Step step : {kDecide1, kShortcut, kFirst, kDecide2, kMiddle, kLast}) {
        if (step == kShortcut && (!has_shortcut_ || shared_shortcut_)) continue;
        if ((step == kDecide1 && !gate1_.decider) || (step == kDecide2 && !gate2_.decider)) continue;
        for (int64_t n = begin; n < end; ++n) push(n, step, work(n, step) / target);
      }
    }
  }

  void push(int64_t n, Step step, double wanted) {
    const auto parts = static_cast<int32_t>(std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, most_parts(n, step)));
    for (int32_t part = 0; part < parts; ++part) queue_.push_back({static_cast<int32_t>(n), part, parts, step});
  }

  bool shared(Step step) const { return step == kShortcut && shared_shortcut_; }

  int64_t most_parts(int64_t n, Step step) const {
    if (step == kDecide1 || step == kDecide2) return 1;
    const int64_t few = N_ < threads() ? ceil_div(threads(), N_) : 1;
    // Every part gathers the weights that it shares with another anew.
    if (step == kMiddle) {
      return std::max(few, 1 + out_pixels() * ceil_div(gate1_.expected(n), kBlock) / 64);
    }
    return 64;
  }

  void compute(const Piece& piece) {
    switch (piece.step) {
      case kShortcut: return run_shortcut(piece);
      case kDecide1: return decide_first(piece.sample);
      case kFirst: return run_first(piece);
      case kDecide2: return decide_second(piece.sample);
      case kMiddle: return run_middle(piece);
      default: return run_last(piece);
    }
  }

  // Rows and channels, or blocks of them, of a part: cut by rows where the image is more than the weights, so that its
  // pixels are read once, else by channels.
  struct Cut {
    int64_t from, to, row, end;

    Cut(const Piece& piece, int64_t many, int64_t unit, int64_t height, bool by_rows)
        : from(0), to(many), row(0), end(height) {
      const auto share = [&](int64_t all, int64_t unit_, int64_t part) {
        return std::min(all, ceil_div(all, unit_) * part / piece.parts * unit_);
      };
      if (by_rows) {  // in pairs, as narrow images are computed
        row = share(height, 2, piece.part), end = share(height, 2, piece.part + 1);
      } else {
        from = share(many, unit, piece.part), to = share(many, unit, piece.part + 1);
      }
    }
    bool is_empty() const { return from >= to || row >= end; }
  };

  void run_shortcut(const Piece& piece) {
    const int64_t last = shared_shortcut_ ? N_ : piece.sample + 1;
    for (int64_t n = piece.sample; n < last; ++n) {
      run_blocks(piece, shortcut_, x_ + n * in_pixels() * shortcut_.C, nullptr, shortcut_.C, nullptr,
                 y_ + n * out_pixels() * shortcut_.K);
    }
  }

  // A 1 x 1 convolution, block after block.
  void run_blocks(const Piece& piece, const InConv& conv, const float* in, const int32_t* channels, int32_t count,
                  const float* residual, float* out) {
    const Cut cut(piece, ceil_div(conv.K, kBlock), 1, conv.size.OH, conv.K < out_pixels() && !shared(piece.step));
    if (cut.is_empty()) return;
    for (int64_t block = cut.from; block < cut.to; ++block) {
      kernels_for(conv.K).in_rows(conv, in, channels, count, static_cast<int>(block), static_cast<int>(block + 1),
                                  static_cast<int>(cut.row), static_cast<int>(cut.end), residual, out);
    }
  }

  void decide_first(int64_t n) {
    const Geometry& g = conv1_.size;
    std::vector<float> mean(conv1_.C, 0.0f);
    for (int row = 0; row < g.H; ++row) {
      kernels().add_pixels(x_ + (n * g.H + row) * g.W * conv1_.C, g.W, conv1_.C, conv1_.C, mean.data());
    }
    for (float& m : mean) m /= static_cast<float>(in_pixels());
    gate1_.decide(n, mean);
  }

  void run_first(const Piece& piece) {
    constexpr int64_t kBytes = 1 << 19;  // of weights, which every few pixels meet again
    const Geometry& g = conv1_.size;
    const int64_t n = piece.sample, count = gate1_.open.count[n];
    const int64_t few = std::max<int64_t>(kBytes / (4 * int64_t{conv1_.C}) / 12 * 12, 12);
    const Cut cut(piece, count, 12, g.H, count <= in_pixels());
    if (cut.is_empty()) return;
    // One row of all pixels: full tiles, whatever the image's width.
    const auto pixels = static_cast<int>((cut.end - cut.row) * g.W);
    OutConv conv = conv1_;
    conv.size = {1, pixels, 1, pixels, 1, 1};
    const float* in = x_ + (n * in_pixels() + cut.row * g.W) * conv1_.C;
    float* planes = planes_of(n) + cut.from * conv1_.plane;
    for (int64_t from = cut.from; from < cut.to; from += few) {
      const auto many = static_cast<int>(std::min(few, cut.to - from));
      kernels_for(conv1_.C).out_rows(conv, in, gate1_.open.list(n) + from, many, static_cast<int>(count - from), 0, 1,
                                     planes + (from - cut.from) * conv1_.plane + cut.row * g.W);
    }
    if (!gate2_.decider) return;
    float* sums = sums_of(n) + cut.from * g.H;
    for (int64_t j = 0; j < cut.to - cut.from; ++j) {
      for (int64_t row = cut.row; row < cut.end; ++row) {
        sums[j * g.H + row] = row_sum(planes + j * conv1_.plane + row * g.W, g.W);
      }
    }
  }

  float* planes_of(int64_t n) { return planes_.mutable_data_ptr<float>() + n % slots_ * hidden_ * conv1_.plane; }
  // Of every row of a sample's planes.
  float* sums_of(int64_t n) { return sums_.mutable_data_ptr<float>() + n % slots_ * hidden_ * conv1_.size.H; }
  float* pixels_of(int64_t n) {
    return pixels_.mutable_data_ptr<float>() + n % slots_ * out_pixels() * whole_lanes(hidden_);
  }

  void decide_second(int64_t n) {
    const int64_t height = conv1_.size.H;
    std::vector<float> mean(hidden_, 0.0f);
    const float* sums = sums_of(n);
    for (int32_t j = 0; j < gate1_.open.count[n]; ++j, sums += height) {
      float sum = 0.0f;
      for (int64_t row = 0; row < height; ++row) sum += sums[row];
      mean[gate1_.open.list(n)[j]] = sum / static_cast<float>(in_pixels());
    }
    gate2_.decide(n, mean);
  }

  // Whether fewer vectors of output channels make up for gathering their weights: costs in vectors multiplied, for each
  // input channel and tap.
  bool gathers(int64_t n) const {
    constexpr double kMoved = 1.5;
    const auto all = static_cast<double>(ceil_div(hidden_, kLane));
    const auto open = static_cast<double>(ceil_div(gate2_.open.count[n], kLane));
    return (all - open) * static_cast<double>(out_pixels()) > kMoved * (all + open);
  }

  // Channels from pixel to pixel of the middle convolution's result.
  int64_t pitch(int64_t n) const { return gathers(n) ? whole_lanes(gate2_.open.count[n]) : hidden_; }

  void run_middle(const Piece& piece) {
    const int64_t n = piece.sample, lanes = pitch(n), height = conv2_.size.OH;
    // A run of pairs of rows, block after block.
    const int64_t pairs = ceil_div(height, 2), all = ceil_div(lanes, kBlock) * pairs;
    int64_t at = all * piece.part / piece.parts;
    const int64_t last = all * (piece.part + 1) / piece.parts;
    while (at < last) {
      const int64_t block = at / pairs, end = std::min(last, (block + 1) * pairs);
      middle_rows(n, block, 2 * (at - block * pairs), std::min(height, 2 * (end - block * pairs)));
      at = end;
    }
  }

  void middle_rows(int64_t n, int64_t block, int64_t row, int64_t end) {
    const int32_t *inputs = gate1_.open.list(n), count = gate1_.open.count[n];
    InConv conv = conv2_;
    if (gathers(n)) {
      ThreadBlock& mine = ThreadBlock::mine();
      const int32_t* outputs = gate2_.open.list(n) + block * kBlock;
      const auto many = static_cast<int>(std::min<int64_t>(kBlock, gate2_.open.count[n] - block * kBlock));
      if (mine.lacks(call_, n, block, hidden_)) {
        kernels().gather_columns(conv2_.weight, hidden_, inputs, count, outputs, many, mine.weight);
        for (int lane = 0; lane < kBlock; ++lane) mine.bias[lane] = lane < many ? conv2_.bias[outputs[lane]] : 0.0f;
      }
      conv.weight = mine.weight, conv.bias = mine.bias, conv.C = count;
      conv.K = static_cast<int>(pitch(n)), conv.first = static_cast<int>(block);
      inputs = nullptr;
    }
    kernels_for(conv.K).in_rows(conv, planes_of(n), inputs, count, static_cast<int>(block), static_cast<int>(block + 1),
                                static_cast<int>(row), static_cast<int>(end), nullptr, pixels_of(n));
  }

  void run_last(const Piece& piece) {
    const int64_t n = piece.sample, image = n * out_pixels() * conv3_.K;
    InConv conv = conv3_;
    conv.pixel_step = pitch(n), conv.row_step = conv.pixel_step * conv.size.W;
    conv.gathered = !gathers(n);
    run_blocks(piece, conv, pixels_of(n), gate2_.open.list(n), gate2_.open.count[n],
               has_shortcut_ ? y_ + image : x_ + image, y_ + image);
  }

  int64_t N_, hidden_;
  BottleneckGate &gate1_, &gate2_;
  const float* x_;
  float* y_;
  bool has_shortcut_;  // which writes into the result, where the block is added to it
  bool shared_shortcut_ = false;  // block after block for all samples: its weights are too many to be fetched for each
  int64_t together_;   // samples that are computed side by side
  int64_t slots_;      // for planes and pixels, which samples take in turn
  OutConv conv1_;
  InConv conv2_, conv3_, shortcut_;
  Tensor planes_, pixels_, sums_;  // what the first and the second convolution leave
  std::vector<Piece> queue_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;  // pieces of every step of a sample
  const uint64_t call_ = next_call();
};

void check_shapes(const BottleneckParts& parts, const Tensor& x, int64_t stride) {
  check_float(x, 4);
  for (const Tensor* weight : {parts.weight2, parts.weight3}) check_float(*weight, 5);
  check_float(*parts.weight1, 4);
  const int64_t hidden = parts.bias1->size(0), K = parts.bias3->size(0), C = x.size(1);
  STD_TORCH_CHECK(parts.weight1->numel() == hidden * C, "weight1 is packed as (M, C)");
  const auto packed = [](const Tensor& weight, int64_t outputs, int64_t inputs, int64_t taps) {
    return weight.is_contiguous() && weight.dim() == 5 && weight.size(0) == ceil_div(outputs, kBlock) &&
           weight.size(1) == inputs && weight.size(2) == taps && weight.size(3) == taps && weight.size(4) == kBlock;
  };
  STD_TORCH_CHECK(packed(*parts.weight2, hidden, hidden, 3) && parts.bias2->numel() == hidden,
                  "weight2 is packed as (M / 32, M, 3, 3, 32)");
  STD_TORCH_CHECK(packed(*parts.weight3, K, hidden, 1), "weight3 is packed as (K / 32, M, 1, 1, 32)");
  const MaybeTensor& shortcut = *parts.shortcut_weight;
  STD_TORCH_CHECK(shortcut.has_value() == parts.shortcut_bias->has_value(), "a shortcut has weights and a bias");
  STD_TORCH_CHECK(shortcut || (stride == 1 && K == C), "a block that changes the shape has a shortcut");
  STD_TORCH_CHECK(!shortcut || packed(*shortcut, K, C, 1), "the shortcut's weight is packed as (K / 32, C, 1, 1, 32)");
  const MaybeTensor& bias = *parts.shortcut_bias;
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == K), "the shortcut's bias is (K,)");
}

std::tuple<Tensor, Tensor> run_bottleneck(const Tensor& x, const std::vector<MaybeTensor>& tensors,
                                          const MaybeTensor& mask1, const MaybeTensor& mask2, int64_t stride,
                                          const Tensor& y) {
  const BottleneckParts parts(tensors);
  check_shapes(parts, x, stride);
  const int64_t N = x.size(0), hidden = parts.bias1->size(0);
  // A gate of more weights than a sample has values is best read for several samples, or by all threads for one. Else
  // the sample's values, which come from afar, are read for the gate and the convolution one after the other.
  const MaybeTensor& layer = parts.gate1[0];
  const bool at_once = layer && (N < threads() || layer->numel() > x.numel() / std::max<int64_t>(N, 1));
  BottleneckGate gate1(parts.gate1, mask1, N, x.size(1), hidden, at_once ? &x : nullptr);
  BottleneckGate gate2(parts.gate2, mask2, N, hidden, hidden);
  if (y.numel()) Bottleneck(parts, x, gate1, gate2, stride, y).run();
  return {gate1.decided, gate2.decided};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> packed_bottleneck(const Tensor& given_x, const std::vector<MaybeTensor>& parts,
                                                     const MaybeTensor& mask1, const MaybeTensor& mask2,
                                                     int64_t stride) {
  check_float(given_x, 4);
  const Tensor x = channels_last(given_x);
  const Geometry size = geometry(x, 3, stride);
  const int64_t K = BottleneckParts(parts).bias3->size(0);
  Tensor y = empty({x.size(0), K, size.OH, size.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  const auto [decided1, decided2] = run_bottleneck(x, parts, mask1, mask2, stride, y);
  return {y, decided1, decided2};
}

// A block of stride 1 without a shortcut writes its result over its images.
std::tuple<Tensor, Tensor> packed_bottleneck_(const Tensor& x, const std::vector<MaybeTensor>& parts,
                                              const MaybeTensor& mask1, const MaybeTensor& mask2) {
  check_float(x, 4);
  STD_TORCH_CHECK(is_channels_last(x) && !*BottleneckParts(parts).shortcut_weight,
                  "the result has the layout of the images");
  return run_bottleneck(x, parts, mask1, mask2, 1, x);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("packed_bottleneck", TORCH_BOX(&gatedkernels::packed_bottleneck));
  m.impl("packed_bottleneck_", TORCH_BOX(&gatedkernels::packed_bottleneck_));
}
