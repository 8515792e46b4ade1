#include "gradients.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/bring.h"
#include "squares.h"

namespace gatedkernels {

Planes::Planes(const Plan& plan, int64_t pixels) : plan_(&plan), pitch_(pitch_of(pixels)), memory_(empty({0})) {
  int64_t total = 0;
  for (int64_t n = 0; n < plan.samples; ++n) offset_.push_back(total), total += plan.count[n] * pitch_;
  memory_ = empty({std::max<int64_t>(total, 1)});
  data_ = memory_.mutable_data_ptr<float>();
}

Planes::Planes(const Plan& plan, const Tensor& memory)
    : plan_(&plan), pitch_(memory.size(2)), memory_(memory), data_(memory_.mutable_data_ptr<float>()) {
  for (int64_t n = 0; n < plan.samples; ++n) offset_.push_back(n * plan.channels * pitch_);
}

Planes Planes::of(const Tensor& images, const Plan& plan) {
  const int64_t H = images.size(2), W = images.size(3), pixels = H * W;
  Planes planes(plan, pixels);
  const float* from = floats(images);
  const int64_t step = images.stride(1), line = images.stride(2), pixel = images.stride(3);
  // Some pixels at a time, whose channels stay in the first-level cache while each plane takes its own.
  constexpr int64_t kTogether = 16;
  const int64_t strips = ceil_div(pixels, kTogether);
  torch::stable::parallel_for(0, plan.samples * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / strips, first = i % strips * kTogether, last = std::min(first + kTogether, pixels);
      const float* image = from + n * images.stride(0);
      int64_t at[kTogether];
      for (int64_t p = first; p < last; ++p) at[p - first] = p / W * line + p % W * pixel;
      const int32_t* channels = plan.list(n);
      for (int32_t j = 0; j < plan.count[n]; ++j) {
        const float* channel = image + channels[j] * step;
        float* to = planes.at(n, j);
        for (int64_t p = first; p < last; ++p) to[p] = channel[at[p - first]];
      }
    }
  });
  return planes;
}

namespace {

// Filters of T taps, `step` floats from one to the next, exchanged with lanes: lanes[t][l] and filters[l][t]. Four
// lanes by four taps at a time are squares.

// The window is mirrored: filters[l][t] to lanes[T - 1 - t][l].
template <int T>
void to_lanes(const float* filters, int64_t step, int64_t count, float* lanes, int64_t row) {
  constexpr int kSquares = T / 4 * 4;
  int64_t l = 0;
  for (; l + 4 <= count; l += 4, filters += 4 * step) {
    for (int t = 0; t < kSquares; t += 4) {
      transpose_square(filters + t, step, lanes + (T - 1 - t) * row + l, -row);
    }
    for (int t = kSquares; t < T; ++t) {
      for (int i = 0; i < 4; ++i) lanes[(T - 1 - t) * row + l + i] = filters[i * step + t];
    }
  }
  for (; l < count; ++l, filters += step) {
    for (int t = 0; t < T; ++t) lanes[(T - 1 - t) * row + l] = filters[t];
  }
}

template <int T>
void from_lanes(const float* lanes, int64_t count, float* filters, int64_t step) {
  constexpr int kSquares = T / 4 * 4;
  int64_t l = 0;
  for (; l + 4 <= count; l += 4, filters += 4 * step) {
    for (int t = 0; t < kSquares; t += 4) transpose_square(lanes + t * kBlock + l, kBlock, filters + t, step);
    for (int t = kSquares; t < T; ++t) {
      for (int i = 0; i < 4; ++i) filters[i * step + t] = lanes[t * kBlock + l + i];
    }
  }
  for (; l < count; ++l, filters += step) {
    for (int t = 0; t < T; ++t) filters[t] = lanes[t * kBlock + l];
  }
}

// The first of the channels [from, to) that some sample uses, or `to`. Filters that are used are rows in no order that
// a processor foresees, read or written: each of them brings the next one.
int64_t next_used(const std::vector<int32_t>& used, int64_t from, int64_t to) {
  while (from < to && !used[from]) ++from;
  return from;
}

}  // namespace

TurnedFilters::TurnedFilters(const Tensor& given, const Plan& plan)
    // Filters of one tap or of one input channel lie alike in both layouts.
    : by_taps(given.size(2) > 1 && given.size(1) > 1 && is_channels_last(given)),
      weight(by_taps ? given : row_major(given)),
      used(plan.uses()),
      floats_(floats(weight)) {}

void TurnedFilters::block(int64_t block, int64_t from, int64_t to, float* turned) const {
  const int64_t C = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t first = block * kBlock, lanes = std::min<int64_t>(kBlock, C - first);
  const float* filters = floats_ + first * taps;
  for (int64_t k = next_used(used, from, to), next; k < to; k = next) {
    next = next_used(used, k + 1, to);
    if (!by_taps && next < to) bring(filters + next * C * taps, lanes * taps);
    float* row = turned + k * taps * kBlock;
    if (lanes < kBlock) std::fill_n(row, taps * kBlock, 0.0f);
    if (by_taps) {
      const float* filter = floats_ + k * C * taps + first;
      for (int64_t t = 0; t < taps; ++t) std::copy_n(filter + (taps - 1 - t) * C, lanes, row + t * kBlock);
      continue;
    }
    (taps == 9 ? to_lanes<9> : to_lanes<1>)(filters + k * C * taps, taps, lanes, row, kBlock);
  }
}

void TurnedFilters::rows(int64_t from, int64_t to, float* turned) const {
  weight.size(2) == 3 ? rows_of<9>(from, to, turned) : rows_of<1>(from, to, turned);
}

template <int T>
void TurnedFilters::rows_of(int64_t from, int64_t to, float* turned) const {
  const int64_t K = weight.size(0), C = weight.size(1);
  std::vector<int64_t> open;
  for (int64_t c = from; c < to; ++c) {
    if (used[c]) open.push_back(c);
  }
  const int64_t count = static_cast<int64_t>(open.size());
  // Neighbours in a row are far apart in the weights, and may share a cache set: some of each are copied side by side.
  constexpr int64_t kTogether = 16;
  constexpr int64_t kStep = kTogether * T;
  float near[kTogether * kStep];
  for (int64_t first = 0; first < K; first += kTogether) {
    const int64_t many = std::min(kTogether, K - first);
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, count);
      for (int64_t k = 0; k < many; ++k) {
        const float* filters = floats_ + (first + k) * C * T;
        const bool more = !by_taps && first + k + kTogether < K;
        float* copy = near + k * kStep;
        for (int64_t j = begin; j < end; ++j, copy += T) {
          if (by_taps) {
            for (int64_t t = 0; t < T; ++t) copy[t] = filters[t * C + open[j]];
          } else {
            std::copy_n(filters + open[j] * T, T, copy);
            // Pieces in no order that a processor foresees.
            if (more) bring(filters + kTogether * C * T + open[j] * T, T);
          }
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        to_lanes<T>(near + (j - begin) * T, kStep, many, turned + (open[j] - from) * T * K + first, K);
      }
    }
  }
}

namespace {

// Items are blocks of lanes times ranges of listed channels: every filter's sums are made by one of them, over the
// samples in order.
class FilterGradient {
 public:
  FilterGradient(const Geometry& size, bool input_lanes, const Tensor& image, const Planes& planes)
      : planes_(planes),
        plan_(planes.plan()),
        size_(size),
        input_lanes_(input_lanes),
        lanes_(image.size(1)),
        pixels_(image.size(2) * image.size(3)),
        taps_(size.S * size.S),
        image_(floats(image)),
        used_(plan_.uses()),
        dweight_(empty({input_lanes ? plan_.channels : lanes_, input_lanes ? lanes_ : plan_.channels, size.S, size.S})),
        out_(dweight_.mutable_data_ptr<float>()) {
    cut();
    if (lanes_ % kWhole) copy_tail();
    if (size.S > 1) find_positions();
  }

  Tensor run() {
    if (dweight_.numel() == 0) return dweight_;
    const int64_t parts = static_cast<int64_t>(cuts_.size()) - 1, sums_items = blocks() * parts;
    // Filters of closed output channels lie together, whole ones: pieces of them would be as many pages to find.
    const int64_t filter = input_lanes_ ? lanes_ * taps_ : 0, some = ceil_div(kClosed, std::max<int64_t>(filter, 1));
    const int64_t closed_items = input_lanes_ ? ceil_div(plan_.channels, some) : 0;
    in_order(sums_items + closed_items, [&](int64_t item) {
      if (item >= sums_items) {
        const int64_t first = (item - sums_items) * some, last = std::min(first + some, plan_.channels);
        for (int64_t k = first; k < last; ++k) {
          if (!used_[k]) std::fill_n(out_ + k * filter, filter, 0.0f);
        }
        return;
      }
      const int64_t from = cuts_[item % parts], to = cuts_[item % parts + 1];
      static thread_local Kept kept;
      float* sums = kept.reserve(kTogether * taps_ * kBlock);
      for (int64_t c = from; c < to; ++c) {
        if (used_[c]) std::fill_n(sums + (c - from) * taps_ * kBlock, taps_ * kBlock, 0.0f);
      }
      add(item / parts, from, to, sums);
      write(item / parts, from, to, sums);
    });
    return dweight_;
  }

 private:
  static constexpr int64_t kWhole = 16;      // lanes of the longest vector
  static constexpr int64_t kTogether = 128;  // listed channels, at most, whose sums stay in the cache
  // Pixels whose products are added one after another: a longer chain would lose digits, and the image leave the cache.
  static constexpr int64_t kPixels = 512;
  static constexpr int64_t kClosed = 1 << 14;  // floats of closed filters that an item looks at

  int64_t blocks() const { return ceil_div(lanes_, kBlock); }

  // Listed channels in ranges of equal work.
  void cut() {
    int64_t total = 0;
    for (const int32_t times : used_) total += times;
    const int64_t M = plan_.channels;
    const double operations = 2.0 * static_cast<double>(taps_ * kBlock * size_.OH * size_.OW * total);
    const int64_t least = ceil_div(M, kTogether), wanted = ceil_div(2 * threads(), std::max<int64_t>(blocks(), 1));
    const int64_t worth = std::min<int64_t>(static_cast<int64_t>(operations / kItemOperations), M);
    const int64_t parts = std::max<int64_t>({least, std::min(wanted, worth), 1});
    cuts_.push_back(0);
    int64_t sum = 0;
    for (int64_t c = 0; c + 1 < M; ++c) {
      sum += used_[c];
      const int64_t part = static_cast<int64_t>(cuts_.size());
      if ((total && sum * parts >= total * part) || c + 1 - cuts_.back() == kTogether) cuts_.push_back(c + 1);
    }
    cuts_.push_back(M);
  }

  // The last lanes, where they fill no vector, with zeros behind them.
  void copy_tail() {
    const int64_t first = (blocks() - 1) * kBlock, rows = plan_.samples * pixels_;
    tail_.assign(rows * kBlock, 0.0f);
    torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(&tail_[i * kBlock], image_ + i * lanes_ + first, (lanes_ - first) * sizeof(float));
      }
    });
  }

  void find_positions() {
    positions_.assign(plan_.samples * plan_.channels, -1);
    for (int64_t n = 0; n < plan_.samples; ++n) {
      for (int32_t j = 0; j < plan_.count[n]; ++j) positions_[n * plan_.channels + plan_.list(n)[j]] = j;
    }
  }

  GradConv conv(int64_t block) const {
    GradConv conv;
    conv.size = size_;
    conv.input_lanes = input_lanes_;
    conv.lanes = static_cast<int>(std::min<int64_t>(kBlock, lanes_ - block * kBlock));
    conv.pixel = conv.lanes % kWhole ? kBlock : lanes_;
    return conv;
  }

  const float* image(const GradConv& conv, int64_t sample, int64_t block) const {
    if (conv.lanes % kWhole) return tail_.data() + sample * pixels_ * kBlock;
    return image_ + sample * pixels_ * lanes_ + block * kBlock;
  }

  // Some rows of a large image, or some small images, at a time.
  void add(int64_t block, int64_t from, int64_t to, float* sums) const {
    const int64_t rows = std::clamp<int64_t>(kPixels / size_.OW, 1, size_.OH);
    const int64_t samples = rows < size_.OH ? 1 : std::max<int64_t>(kPixels / (size_.OH * size_.OW), 1);
    for (int64_t n = 0; n < plan_.samples; n += samples) {
      const int64_t last = std::min(n + samples, plan_.samples);
      for (int row = 0; row < size_.OH; row += rows) {
        const int end = static_cast<int>(std::min<int64_t>(row + rows, size_.OH));
        if (size_.S == 1) {
          add_samples(block, from, to, n, last, row, end, sums);
        } else {
          add_channels(block, from, to, n, last, row, end, sums);
        }
      }
    }
  }

  // Channel by channel, in registers over the samples that have it open.
  void add_channels(int64_t block, int64_t from, int64_t to, int64_t first, int64_t last, int row, int end,
                    float* sums) const {
    const GradConv grad = conv(block);
    std::vector<GradRun> runs(last - first);
    for (int64_t c = from; c < to; ++c) {
      int count = 0;
      for (int64_t n = first; n < last; ++n) {
        const int32_t position = positions_[n * plan_.channels + c];
        if (position >= 0) runs[count++] = {image(grad, n, block), {planes_.at(n, position)}, row, end};
      }
      float* sum = sums + (c - from) * taps_ * kBlock;
      if (count) kernels_for(lanes_).grad_rows(grad, runs.data(), count, 1, &sum);
    }
  }

  // Sample by sample, some of its open channels together.
  void add_samples(int64_t block, int64_t from, int64_t to, int64_t first, int64_t last, int row, int end,
                   float* sums) const {
    const GradConv grad = conv(block);
    const int together = grad.planes();
    for (int64_t n = first; n < last; ++n) {
      const int32_t *list = plan_.list(n), *behind = list + plan_.count[n];
      const int64_t begin = std::lower_bound(list, behind, from) - list;
      const int64_t stop = std::lower_bound(list, behind, to) - list;
      for (int64_t j = begin; j < stop; j += together) {
        GradRun run{image(grad, n, block), {}, row, end};
        float* into[8];
        const int many = static_cast<int>(std::min<int64_t>(together, stop - j));
        for (int i = 0; i < together; ++i) {
          const int64_t at = j + std::min(i, many - 1);
          run.plane[i] = planes_.at(n, at);
          into[i] = sums + (list[at] - from) * kBlock;
        }
        kernels_for(lanes_).grad_rows(grad, &run, 1, many, into);
      }
    }
  }

  // From rows of lanes to filters as PyTorch has them.
  void write(int64_t block, int64_t from, int64_t to, const float* sums) const {
    const int64_t first = block * kBlock, lanes = std::min<int64_t>(kBlock, lanes_ - first);
    if (input_lanes_) {
      for (int64_t k = next_used(used_, from, to), next; k < to; k = next) {
        next = next_used(used_, k + 1, to);
        float* filter = out_ + (k * lanes_ + first) * taps_;
        if (next < to) bring(filter + (next - k) * lanes_ * taps_, lanes * taps_);
        (taps_ == 9 ? from_lanes<9> : from_lanes<1>)(sums + (k - from) * taps_ * kBlock, lanes, filter, taps_);
      }
      return;
    }
    // Four filters and some channels at a time: these are neighbours there, and their sums stay in the cache.
    constexpr int64_t kNear = 16, kFilters = 4;
    const int64_t step = plan_.channels * taps_;
    for (int64_t begin = from; begin < to; begin += kNear) {
      const int64_t end = std::min(begin + kNear, to);
      for (int64_t l = 0; l < lanes; l += kFilters) {
        const int64_t many = std::min(kFilters, lanes - l);
        float* filters = out_ + (first + l) * step + begin * taps_;
        for (int64_t i = 0; i < many; ++i) {
          float* filter = filters + i * step;
          if (l + i + kFilters < lanes) bring(filter + kFilters * step, (end - begin) * taps_);
          std::fill_n(filter, (end - begin) * taps_, 0.0f);
        }
        for (int64_t c = begin; c < end; ++c) {
          if (!used_[c]) continue;
          (taps_ == 9 ? from_lanes<9> : from_lanes<1>)(sums + (c - from) * taps_ * kBlock + l, many,
                                                       filters + (c - begin) * taps_, step);
        }
      }
    }
  }

  const Planes& planes_;
  const Plan& plan_;
  Geometry size_;
  bool input_lanes_;
  int64_t lanes_, pixels_, taps_;
  const float* image_;
  std::vector<int32_t> used_;       // by how many samples, for every listed channel
  std::vector<int64_t> cuts_;       // of the listed channels
  std::vector<float> tail_;
  std::vector<int32_t> positions_;  // in each sample's planes, or -1
  Tensor dweight_;
  float* out_;
};

}  // namespace

Tensor filter_gradient(const Geometry& size, bool input_lanes, const Tensor& image, const Planes& planes) {
  return FilterGradient(size, input_lanes, channels_last(image), planes).run();
}

}  // namespace gatedkernels
