// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, 2016): an image is cut into tiles of 2 x 2 output pixels,
// and each tile's 4 x 4 input pixels are transformed into 16 components, so that a 3 x 3 window costs 16 products for
// four pixels instead of 36. This file: from pixels to components. Lanes run along the tiles.
//
// Components of some channels and a strip of tiles: 16 tables of channels x pitch, component_step floats apart.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace gatedkernels {

// Calls body(offset, lanes) until [0, count) is covered by vectors of at most L lanes; the last one overlaps with those
// before it rather than reach beyond the end. `lanes` is a compile-time constant.
template <int L, class Body>
GK_INLINE void cover(int count, const Body& body) {
  if (count >= L) {
    int i = 0;
    for (; i + L <= count; i += L) body(i, std::integral_constant<int, L>{});
    if (i < count) body(count - L, std::integral_constant<int, L>{});
  } else if constexpr (L > 1) {
    cover<L / 2>(count, body);
  }
}

// The same where the end may be written beyond: the rest goes into the shortest vector that holds it.
template <int L, class Body>
GK_INLINE void cover_beyond(int count, const Body& body) {
  int i = 0;
  for (; i + L <= count; i += L) body(i, std::integral_constant<int, L>{});
  const int rest = count - i;
  if (rest <= 0) return;
  if constexpr (L > 8) {
    if (rest > 8) return body(i, std::integral_constant<int, L>{});
  }
  if constexpr (L > 4) {
    if (rest > 4) return body(i, std::integral_constant<int, 8>{});
  }
  body(i, std::integral_constant<int, 4>{});
}

// body(row, column, count, at): `count` tiles side by side, `at` tiles after the first one of the strip.
template <class Body>
GK_INLINE void for_each_row(const TileGrid& grid, Strip strip, const Body& body) {
  int row = strip.first / grid.columns, column = strip.first % grid.columns;
  for (int at = 0, left = strip.tiles(); left > 0; ++row, column = 0) {
    const int count = grid.columns - column < left ? grid.columns - column : left;
    body(row, column, count, at);
    at += count, left -= count;
  }
}

template <int L>
struct Tiles {
  // The pixels of a strip's tiles, split by the parity of their row and column in the padded image: four tables of
  // (rows + 1) x (columns + 1) pixels for each channel. Tile (i, j) covers entries i, i + 1 and j, j + 1 of all four.
  struct Split {
    int first, rows, pitch;
    int64_t table, channel;  // floats

    Split(const TileGrid& grid, Strip strip)
        : first(strip.first / grid.columns),
          rows((strip.last - 1) / grid.columns - first + 2),
          pitch(grid.columns + 1) {
      table = (int64_t{rows} * pitch + 15) / 16 * 16;
      channel = 4 * table + 16;  // tables a power of two apart would share cache sets
    }
  };

  static GK_INLINE void transpose(Vector<L> (&v)[L]) {
    // Interleaving the halves log2(L) times is a transposition.
#pragma GCC unroll 4
    for (int step = 1; step < L; step *= 2) {
      Vector<L> u[L];
#pragma GCC unroll 8
      for (int i = 0; i < L / 2; ++i) {
        u[2 * i] = lower_interleaved<L>(v[i], v[i + L / 2]);
        u[2 * i + 1] = upper_interleaved<L>(v[i], v[i + L / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = u[i];
    }
  }

  // Where the entries of the four tables lie in an NHWC image; -1: in the padding.
  static void find_pixels(const Split& to, const Geometry& g, int C, int32_t* offsets) {
    for (int parity = 0; parity < 4; ++parity) {
      int32_t* entry = offsets + parity * to.table;
      int32_t* const end = entry + to.table;
      for (int a = 0; a < to.rows; ++a) {
        const int y = 2 * (to.first + a) + parity / 2 - 1;
        for (int b = 0; b < to.pitch; ++b) {
          const int x = 2 * b + parity % 2 - 1;
          *entry++ = 0 <= y && y < g.H && 0 <= x && x < g.W ? (y * g.W + x) * C : -1;
        }
      }
      while (entry < end) *entry++ = -1;
    }
  }

  // Up to L neighbouring channels of an NHWC image.
  static void split_image(const Split& to, const int32_t* offsets, const float* x, int valid, float* split) {
    alignas(64) static constexpr float kZeros[L] = {};
    for (int64_t e = 0; e < 4 * to.table; e += L) {
      Vector<L> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const float* pixel = offsets[e + i] < 0 ? kZeros : x + offsets[e + i];
        v[i] = valid == L ? load<L>(pixel) : load_first<L>(pixel, valid);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int c = 0; c < L; ++c) store<L>(split + c * to.channel + e, v[c]);
    }
  }

  // One channel's plane of pixels.
  static void split_plane(const Split& to, const Geometry& g, const float* plane, float* split) {
    for (int a = 0; a < to.rows; ++a) {
      for (int odd = 0; odd < 2; ++odd) {
        const int y = 2 * (to.first + a) + odd - 1;
        float* left = split + 2 * odd * to.table + a * to.pitch;  // pixels -1, 1, 3, …
        float* right = left + to.table;                           // pixels 0, 2, 4, …
        if (y < 0 || y >= g.H) {
          for (int i = 0; i < to.pitch; ++i) left[i] = right[i] = 0;
          continue;
        }
        const float* row = plane + int64_t{y} * g.W;
        left[0] = 0;
        cover<L>(g.W / 2, [&](int i, auto lanes) __attribute__((always_inline)) {
          constexpr int M = decltype(lanes)::value;
          const Vector<M> u = load<M>(row + 2 * i), v = load<M>(row + 2 * i + M);
          store<M>(right + i, evens<M>(u, v));
          store<M>(left + i + 1, odds<M>(u, v));
        });
        if (g.W % 2) {
          right[g.W / 2] = row[g.W - 1];
          left[to.pitch - 1] = right[to.pitch - 1] = 0;
        } else {
          right[to.pitch - 1] = 0;
        }
      }
    }
  }

  // Tiles side by side: `corner` is the first one's entry in the first table, `to` its place in the first component.
  static __attribute__((noinline)) void transform_row(const float* corner, int64_t table, int64_t pitch, int count,
                                                      float* to, int64_t step) {
    cover_beyond<L>(count, [=](int i, auto lanes) __attribute__((always_inline)) {
      constexpr int M = decltype(lanes)::value;
      float* row = to + i;
      Vector<M> t[4][4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const float* column = corner + i + c % 2 * table + c / 2;
        Vector<M> d0 = load<M>(column), d1 = load<M>(column + 2 * table), d2 = load<M>(column + pitch),
                  d3 = load<M>(column + 2 * table + pitch);
        pin(d0), pin(d1), pin(d2), pin(d3);
        t[0][c] = d0 - d2, t[1][c] = d1 + d2, t[2][c] = d2 - d1, t[3][c] = d1 - d3;
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r, row += 4 * step) {
        asm("" : "+r"(row));  // or the compiler keeps sixteen pointers, and spends more on them than on the sums
        store<M>(row, t[r][0] - t[r][2]);
        store<M>(row + step, t[r][1] + t[r][2]);
        store<M>(row + 2 * step, t[r][2] - t[r][1]);
        store<M>(row + 3 * step, t[r][1] - t[r][3]);
      }
    });
  }

  // One channel from its split pixels to its row of every component. What lies behind the last tile is left as it is:
  // lanes that read it compute what nobody asks for.
  static void transform(const Split& from, const TileGrid& grid, Strip strip, const float* split, float* row,
                        int64_t step) {
    for_each_row(grid, strip, [&](int y, int x, int count, int at) {
      transform_row(split + (y - from.first) * from.pitch + x, from.table, from.pitch, count, row + at, step);
    });
  }

  static GK_INLINE void keep_corner(const Components& components, int tile, int channel) {
    for (int r = 0; r < 3; ++r) {
      for (int c = 0; c < 3; ++c) components.corner(r, c)[channel] = components.row(4 * r + c, channel)[tile];
    }
  }

  static void from_image(const TileGrid& grid, Strip strip, const float* x, int64_t C, int from, int to,
                         const Components& components, float* scratch) {
    const Split split(grid, strip);
    int32_t* offsets = reinterpret_cast<int32_t*>(scratch + L * split.channel);
    find_pixels(split, grid.size, static_cast<int>(C), offsets);
    const bool corner = has_lone_corner(grid, strip);
    for (int c = from; c < to; c += L) {
      const int valid = to - c < L ? to - c : L;
      split_image(split, offsets, x + c, valid, scratch);
      for (int i = 0; i < valid; ++i) {
        transform(split, grid, strip, scratch + i * split.channel, components.row(0, c + i), components.step);
        if (corner) keep_corner(components, strip.tiles() - 1, c + i);
      }
    }
  }

  static void from_planes(const TileGrid& grid, Strip strip, const float* planes, int64_t plane, int from, int to,
                          const Components& components, float* scratch) {
    const Split split(grid, strip);
    for (int c = from; c < to; ++c) {
      split_plane(split, grid.size, planes + c * plane, scratch);
      transform(split, grid, strip, scratch, components.row(0, c), components.step);
    }
  }

  // The four pixels of a tile, row by row, from its 16 components.
  template <int M>
  static GK_INLINE void pixels(const Vector<M> (&m)[16], Vector<M> (&y)[4]) {
    Vector<M> t[2][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      t[0][c] = m[c] + m[4 + c] + m[8 + c];
      t[1][c] = m[4 + c] - m[8 + c] - m[12 + c];
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      y[2 * r] = t[r][0] + t[r][1] + t[r][2];
      y[2 * r + 1] = t[r][1] - t[r][2] - t[r][3];
    }
  }
};

}  // namespace gatedkernels
