// How images are cut into strips of tiles, and when convolving on tiles pays.
#pragma once

#include <algorithm>
#include <cstdint>

#include "queue.h"

namespace gatedkernels {

// The strips of tiles that every sample is cut into, for one of the convolutions.
class Strips {
 public:
  int count;

  // `most` tiles are what a core's cache holds the components of.
  Strips(const TileGrid& grid, int64_t samples, int64_t most) : samples_(samples), tiles_(grid.tiles()) {
    constexpr int64_t kLeast = 32;
    const int64_t all = threads();
    int64_t wanted = std::max<int64_t>(1, (tiles_ + most / 2) / most);
    // Few strips become as many for each thread.
    const int64_t rounded = ceil_div(wanted, all) * all;
    if (samples * wanted < 4 * all && rounded * kLeast <= tiles_) wanted = rounded;
    size_ = static_cast<int>(std::max<int64_t>(16, (tiles_ / wanted + 8) / 16 * 16));
    count = std::max(1, (tiles_ + size_ / 2) / size_);
  }

  Strip at(int i) const { return {i * size_, i + 1 == count ? tiles_ : (i + 1) * size_}; }
  int64_t widest() const { return std::max(size_, tiles_ - (count - 1) * size_); }

  // Into how many parts the `channels` of each strip are cut, none smaller than `least`: one if strips are enough work
  // to share out, for every part transforms its strip anew.
  int64_t parts(int64_t channels, int64_t least) const {
    const int64_t all = threads(), items = samples_ * count;
    const bool even = 10 * count * widest() <= 11 * tiles_;
    if (items >= 4 * all || (items % all == 0 && even)) return 1;
    const int64_t wanted =
        samples_ == 1 ? all * std::max<int64_t>(1, channels / (2 * least * all)) : ceil_div(4 * all, items);
    return std::clamp<int64_t>(channels / least, 1, wanted);
  }

 private:
  int64_t samples_;
  int tiles_, size_;
};

// Taps of all windows that do not fall into the padding.
inline double taps_inside(const Geometry& g) { return (3.0 * g.H - 2) * (3.0 * g.W - 2); }

constexpr int kLeastTiles = 9;  // an image of fewer is never computed on them; gatedkernels/ops/packed.py knows it too

// Costs in multiply-adds of a vector, for each input channel, of `count` active output channels. What a transform takes
// beside them was measured on Zen 4.
inline bool out_tiles_pay(const TileGrid& grid, int32_t count) {
  constexpr int kTransformRow = 70, kSplitTile = 3;
  const int64_t lanes = ceil_div(grid.tiles(), 4) * 4;
  const double transform = static_cast<double>(kTransformRow * grid.rows * ceil_div(grid.columns, 16)) +
                           static_cast<double>(kSplitTile * grid.tiles());
  return grid.size.stride == 1 && grid.tiles() >= kLeastTiles &&
         static_cast<double>(count * lanes) + transform < count * taps_inside(grid.size) / 16;
}

// Tiles are read and written at their ends, in a burst, and large images of many samples, of so many numbers each, are
// not near then. As measured with two threads; any other number decides alike, or results would depend on it.
inline bool far_images(int64_t samples, int64_t image) { return samples > 2 && image >= 1 << 16; }

// The same as out_tiles_pay for each vector of output channels, of `count` active input channels.
inline bool in_tiles_pay(const TileGrid& grid, int32_t count, int64_t samples, int64_t image) {
  const int finish = far_images(samples, image) ? 190 : 90;
  return grid.size.stride == 1 && grid.tiles() >= kLeastTiles &&
         (16.0 * count + finish) * grid.tiles() < count * taps_inside(grid.size);
}

// The components of the strip that the calling thread computed from last, and memory for the kernels beside them.
class ThreadTiles {
 public:
  float *components, *scratch;

  static ThreadTiles& mine() {
    thread_local ThreadTiles tiles;
    return tiles;
  }

  void reserve(int64_t component_floats, int64_t scratch_floats) {
    components = kept_.reserve(component_floats + scratch_floats);
    scratch = components + component_floats;
  }

  // Whether they are not those of this strip yet; from now on they are.
  bool lacks(uint64_t call, Stage stage, int32_t sample, Strip strip) {
    return kept_.lacks({call, stage, sample, strip.first});
  }

 private:
  struct Key {
    uint64_t call;
    Stage stage;
    int32_t sample, first;
    bool operator==(const Key&) const = default;
  };

  KeptResult<Key> kept_;
};

}  // namespace gatedkernels
