#include "gradients.h"

#include <algorithm>
#include <cstring>
#include <memory>

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

// Filters of T taps, each `step` floats behind the one before, exchanged with lanes: lanes[t][l] and filters[l][t].
template <int T>
void to_lanes(const float* filters, int64_t step, int64_t count, float* lanes) {
  for (int64_t l = 0; l < count; ++l) {
    for (int t = 0; t < T; ++t) lanes[t * kBlock + l] = filters[l * step + T - 1 - t];  // the window mirrored
  }
}

template <int T>
void from_lanes(const float* lanes, int64_t count, int64_t step, float* filters) {
  for (int64_t l = 0; l < count; ++l) {
    for (int t = 0; t < T; ++t) filters[l * step + t] = lanes[t * kBlock + l];
  }
}

}  // namespace

TurnedFilters::TurnedFilters(const Tensor& given, const Plan& plan)
    // Filters of one tap or of one input channel lie alike in both layouts.
    : by_taps(given.size(2) > 1 && given.size(1) > 1 && is_channels_last(given)),
      weight(by_taps ? given : row_major(given)),
      used(plan.uses()) {}

void TurnedFilters::block(int64_t block, int64_t from, int64_t to, float* turned) const {
  const int64_t C = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t first = block * kBlock, lanes = std::min<int64_t>(kBlock, C - first);
  const float* filters = floats(weight) + first * taps;
  for (int64_t k = from; k < to; ++k) {
    if (!used[k]) continue;
    float* row = turned + k * taps * kBlock;
    if (lanes < kBlock) std::fill_n(row, taps * kBlock, 0.0f);
    if (by_taps) {
      const float* filter = floats(weight) + k * C * taps + first;
      for (int64_t t = 0; t < taps; ++t) std::copy_n(filter + (taps - 1 - t) * C, lanes, row + t * kBlock);
      continue;
    }
    (taps == 9 ? to_lanes<9> : to_lanes<1>)(filters + k * C * taps, taps, lanes, row);
  }
}

void TurnedFilters::rows(int64_t from, int64_t to, float* turned) const {
  const int64_t K = weight.size(0), C = weight.size(1), taps = weight.size(2) * weight.size(3);
  // Neighbours in a row are far apart in the weights, and may share a cache set: some of each are copied side by side.
  constexpr int64_t kTogether = 16;
  float near[kTogether][kTogether * 9];
  for (int64_t first = 0; first < K; first += kTogether) {
    const int64_t many = std::min(kTogether, K - first);
    for (int64_t begin = from; begin < to; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, to);
      for (int64_t k = 0; k < many; ++k) {
        if (by_taps) {
          const float* filter = floats(weight) + (first + k) * C * taps;
          for (int64_t i = 0; i < (end - begin) * taps; ++i) near[k][i] = filter[i % taps * C + begin + i / taps];
          continue;
        }
        std::memcpy(near[k], floats(weight) + ((first + k) * C + begin) * taps, (end - begin) * taps * sizeof(float));
      }
      for (int64_t c = begin; c < end; ++c) {
        if (!used[c]) continue;
        for (int64_t t = 0; t < taps; ++t) {
          float* row = turned + ((c - from) * taps + t) * K + first;
          const float* column = near[0] + (c - begin) * taps + taps - 1 - t;
          for (int64_t k = 0; k < many; ++k) row[k] = column[k * kTogether * 9];
        }
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
    const int64_t parts = static_cast<int64_t>(cuts_.size()) - 1;
    in_order(blocks() * parts, [&](int64_t item) {
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
      for (int64_t k = from; k < to; ++k) {
        const float* sum = sums + (k - from) * taps_ * kBlock;
        float* filter = out_ + (k * lanes_ + first) * taps_;
        if (!used_[k]) {
          std::fill_n(filter, lanes * taps_, 0.0f);
          continue;
        }
        (taps_ == 9 ? from_lanes<9> : from_lanes<1>)(sum, lanes, taps_, filter);
      }
      return;
    }
    float* filters = out_ + first * plan_.channels * taps_;
    for (int64_t c = from; c < to; ++c) {
      const float* sum = sums + (c - from) * taps_ * kBlock;
      if (used_[c]) {
        (taps_ == 9 ? from_lanes<9> : from_lanes<1>)(sum, lanes, plan_.channels * taps_, filters + c * taps_);
      } else {
        for (int64_t l = 0; l < lanes; ++l) std::fill_n(filters + (l * plan_.channels + c) * taps_, taps_, 0.0f);
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
