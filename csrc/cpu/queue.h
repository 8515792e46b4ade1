// The work of a gated basic block, cut into items: those of the shortcut and of conv1 of a group of samples, then those
// of conv2, which wait for both of their sample.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "tensors.h"

namespace gatedkernels {

// What an item computes of one sample.
enum class Stage : uint8_t {
  shortcut,   // rows of the shortcut's blocks of output channels
  out_rows,   // rows of conv1's active channels
  out_tiles,  // the same of a strip of tiles
  in_rows,    // rows of conv2's blocks of output channels
  in_tiles,
};

inline bool before_conv2(Stage stage) { return stage != Stage::in_rows && stage != Stage::in_tiles; }

// Channels or blocks [from, to), and rows or tiles [begin, end).
struct Item {
  int32_t sample, from, to, begin, end;
  Stage stage;
};

class Queue {
 public:
  std::vector<Item> items;
  std::vector<int32_t> pending;  // items before conv2, for every sample

  // `operations` is what there is to do in all: items are a small share of it, so that all threads end together.
  Queue(int64_t N, int64_t height, double operations)
      : pending(N, 0),
        height_(height),
        target_(std::clamp(operations / static_cast<double>(24 * threads()), kLeastOperations, kMostOperations)) {
    items.reserve(512);
  }

  // Cuts [from, to), each row of each channel or block worth `operations`, into items of a handy size. `unit` channels
  // are best computed together. Whole images are cut by channels first, so that nobody reads another's weights; other
  // images by rows, so that their pixels are read once.
  void add_rows(int64_t sample, Stage stage, int64_t from, int64_t to, int64_t unit, double operations, bool whole) {
    if (from >= to) return;
    auto fitting = [&](double each) { return static_cast<int64_t>(target_ / each); };
    int64_t rows = height_, many = std::min(whole ? unit : 12, to - from);
    if (whole) {
      many *= std::max<int64_t>(1, fitting(operations * static_cast<double>(many * height_)));
      if (operations * static_cast<double>(many * height_) > 2 * target_) {
        rows = fitting(operations * static_cast<double>(many));
      }
    } else {
      rows = fitting(operations * static_cast<double>(many));
      if (rows >= height_) many *= rows / height_;
    }
    rows = std::clamp<int64_t>(rows, 1, height_);
    if (rows > 1 && rows < height_) rows -= rows % 2;  // narrow images are computed in pairs of rows
    for (int64_t j = from; j < to; j += many) {
      for (int64_t row = 0; row < height_; row += rows) {
        push(sample, stage, j, std::min(j + many, to), row, std::min(row + rows, height_));
      }
    }
  }

  // Cuts channels or blocks [0, count) of a strip into `parts`.
  void add_tiles(int64_t sample, Stage stage, int64_t count, int64_t parts, Strip strip) {
    for (int64_t part = 0; part < parts; ++part) {
      push(sample, stage, count * part / parts, count * (part + 1) / parts, strip.first, strip.last);
    }
  }

 private:
  void push(int64_t sample, Stage stage, int64_t from, int64_t to, int64_t begin, int64_t end) {
    items.push_back({static_cast<int32_t>(sample), static_cast<int32_t>(from), static_cast<int32_t>(to),
                     static_cast<int32_t>(begin), static_cast<int32_t>(end), stage});
    pending[sample] += before_conv2(stage);
  }

  static constexpr double kLeastOperations = 2e5, kMostOperations = 8e6;  // about 2 and 80 microseconds of a core
  int64_t height_;
  double target_;
};

// Computes all items: those before conv2 by `before`, the others by `conv2` as soon as those of their sample are done.
template <class Before, class Conv2>
void run_queue(const Queue& queue, const Before& before, const Conv2& conv2) {
  const size_t N = queue.pending.size();
  const auto left = std::make_unique<std::atomic<int32_t>[]>(N);  // items before conv2, for every sample
  for (size_t n = 0; n < N; ++n) left[n].store(queue.pending[n], std::memory_order_relaxed);
  in_order(static_cast<int64_t>(queue.items.size()), [&](int64_t at) {
    const Item& item = queue.items[at];
    std::atomic<int32_t>& mine = left[item.sample];
    if (before_conv2(item.stage)) {
      before(item);
      mine.fetch_sub(1, std::memory_order_release);
    } else {
      wait_until([&] { return mine.load(std::memory_order_acquire) == 0; });
      conv2(item);
    }
  });
}

}  // namespace gatedkernels
