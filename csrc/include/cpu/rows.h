// How the rows of an image are cut into register tiles.
#pragma once

#include <array>

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace gatedkernels {

// Floating-point registers for accumulators; the rest hold operands.
template <int L>
constexpr int kAccumulators = L == 16 ? 24 : 12;

// A row of `width` pixels in `tiles` tiles, as even as they come.
struct RowCut {
  int tiles, size, larger;  // the first `larger` tiles have size + 1 pixels

  RowCut(int width, int tiles_) : tiles(tiles_), size(width / tiles_), larger(width % tiles_) {}

  int widest() const { return size + (larger ? 1 : 0); }
};

// Whether a tile's first pixel reads left of the image, and its last one right of it.
inline bool reads_left(const Geometry& g, int pixel) { return pixel * g.stride - g.S / 2 < 0; }
inline bool reads_right(const Geometry& g, int pixel) { return pixel * g.stride + g.S / 2 >= g.W; }

// Where the taps of row r of the window fall for a tile whose first output row is `row`.
inline int input_row(const Geometry& g, int row, int r) { return row * g.stride + r - g.S / 2; }
inline bool inside(const Geometry& g, int row) { return 0 <= row && row < g.H; }

}  // namespace gatedkernels
