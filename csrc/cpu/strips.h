// How images are cut into strips of tiles, and when convolving on tiles pays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace gatedkernels {

// The strips of tiles that every sample is cut into, for one of the convolutions.
struct Strips {
  int tiles, count, size;
  bool together;  // one thread computes a strip from beginning to end; else its channels are shared out

  Strips(const TileGrid& grid, int64_t samples, int64_t most) : tiles(grid.tiles()) {
    constexpr int64_t kLeast = 32;
    const int64_t all = threads();
    int64_t wanted = std::max<int64_t>(1, (tiles + most / 2) / most);
    // Few strips become as many for each thread.
    if (samples * wanted < 4 * all && ceil_div(wanted, all) * all * kLeast <= tiles) wanted = ceil_div(wanted, all) * all;
    together = samples * wanted >= 4 * all || wanted % all == 0;
    size = static_cast<int>(std::max<int64_t>(16, (tiles / wanted + 8) / 16 * 16));
    count = std::max(1, (tiles + size / 2) / size);
  }

  Strip at(int i) const { return {i * size, i + 1 == count ? tiles : (i + 1) * size}; }
  int64_t widest() const { return std::max(size, tiles - (count - 1) * size); }
  int64_t shared_floats(int64_t channels) const { return together ? 0 : count * component_floats(channels); }
  int64_t component_floats(int64_t channels) const { return Components::floats(channels, widest()); }
};

// Taps of all windows that do not fall into the padding.
inline double taps_inside(const Geometry& g) { return (3.0 * g.H - 2) * (3.0 * g.W - 2); }

// Costs in multiply-adds of a vector, for each input channel, of `count` active output channels. What a transform takes
// beside them was measured on Zen 4.
inline bool out_tiles_pay(const TileGrid& grid, int32_t count) {
  constexpr int kLeastTiles = 9, kTransformRow = 70, kSplitTile = 3;
  const int64_t lanes = ceil_div(grid.tiles(), 4) * 4;
  const double transform = static_cast<double>(kTransformRow * grid.rows * ceil_div(grid.columns, 16)) +
                           static_cast<double>(kSplitTile * grid.tiles());
  return grid.size.stride == 1 && grid.tiles() >= kLeastTiles &&
         static_cast<double>(count * lanes) + transform < count * taps_inside(grid.size) / 16;
}

// The same for each vector of output channels, of `count` active input channels.
inline bool in_tiles_pay(const TileGrid& grid, int32_t count) {
  constexpr int kLeastTiles = 9, kFinish = 90;
  return grid.size.stride == 1 && grid.tiles() >= kLeastTiles &&
         (16.0 * count + kFinish) * grid.tiles() < count * taps_inside(grid.size);
}

// Memory of the calling thread that outlives a call, so that its pages stay mapped; a cache line begins there.
inline float* thread_scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  constexpr size_t kLine = 16;
  if (memory.size() < static_cast<size_t>(floats) + kLine) memory.resize(static_cast<size_t>(floats) + kLine);
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - at % 64) % 64 / sizeof(float);
}

}  // namespace gatedkernels
