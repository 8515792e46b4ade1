// The kernel of the filters' gradient: lanes run along the channels of an NHWC image, and the planes of the listed
// channels are broadcast, so an active channel is nothing but a pointer. A tile is all taps of a window, of some
// planes, times up to two vectors; it stays in registers over all pixels of its runs.
#pragma once

#include "cpu/rows.h"

namespace gatedkernels {

template <int L>
struct GradRows {
  static constexpr int kVectors = L == 16 ? 2 : 1;

  template <int S, int T, int V>
  struct Sums {
    Vector<L> at[T][S][S][V];
  };

  // How far it is from tap to tap, and from one pixel and row of the output to the next.
  struct Steps {
    int64_t image_tap, image_line, plane_line;
    int64_t image_next, plane_next, image_row, plane_row;
  };

  // The taps [Top, Bottom) x [Left, Right) of one output pixel. They are pixels of the image (OnImage), or of the
  // planes; `image` and `at` are where the window begins, or the one pixel.
  template <bool OnImage, int Top, int Bottom, int Left, int Right, int S, int T, int V>
  static GK_INLINE void pixel(Sums<S, T, V>& sum, const Steps& steps, const float* image, const GradRun& run,
                              int64_t at) {
    Vector<L> a[V];
    auto read = [&](const float* from) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        a[v] = load<L>(from + v * L);
        pin(a[v]);
      }
    };
    if constexpr (!OnImage) read(image);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      Vector<L> b;
      if constexpr (OnImage) b = broadcast<L>(run.plane[t][at]), pin(b);
#pragma GCC unroll 3
      for (int r = Top; r < Bottom; ++r) {
#pragma GCC unroll 3
        for (int s = Left; s < Right; ++s) {
          if constexpr (OnImage) {
            read(image + r * steps.image_line + s * steps.image_tap);
          } else {
            b = broadcast<L>(run.plane[t][at + r * steps.plane_line + s]);
            pin(b);
          }
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum.at[t][r][s][v] += a[v] * b;
        }
      }
    }
  }

  // One row of the output; the first pixel reads left of the tapped side, the last one right of it if `right`.
  template <bool OnImage, int Top, int Bottom, int S, int T, int V>
  static GK_INLINE void row(Sums<S, T, V>& sum, const Steps& steps, const float* image, const GradRun& run, int64_t at,
                            int width, bool right) {
    int x = 0;
    if constexpr (S == 3) {
      if (right && width == 1) {
        pixel<OnImage, Top, Bottom, 1, 2>(sum, steps, image, run, at);
        return;
      }
      pixel<OnImage, Top, Bottom, 1, 3>(sum, steps, image, run, at);
      image += steps.image_next, at += steps.plane_next, ++x;
      width -= right;
    }
    for (; x < width; ++x, image += steps.image_next, at += steps.plane_next) {
      pixel<OnImage, Top, Bottom, 0, S>(sum, steps, image, run, at);
    }
    if constexpr (S == 3) {
      if (right) pixel<OnImage, Top, Bottom, 0, 2>(sum, steps, image, run, at);
    }
  }

  template <bool OnImage, int S, int T, int V>
  static void tile(const GradConv& conv, const GradRun* runs, int count, int planes, int lane, float* const* sums) {
    const Geometry& g = conv.size;
    // At stride 1 the gradient is the same with the sides exchanged and the window mirrored: taps then are single
    // values of the planes, and the vectors of the image are read once.
    const bool mirrored = conv.input_lanes && !OnImage && S == 3;
    const int width = conv.input_lanes ? g.W : g.OW, plane_width = conv.input_lanes ? g.OW : g.W;
    const int lane_stride = conv.input_lanes ? g.stride : 1, plane_stride = conv.input_lanes ? 1 : g.stride;
    const int64_t line = width * conv.pixel;
    const bool right = (g.OW - 1) * g.stride + 1 >= g.W;
    const Steps steps{conv.pixel,
                      line,
                      plane_width,
                      conv.pixel * lane_stride,
                      plane_stride,
                      line * lane_stride,
                      int64_t{plane_width} * plane_stride};
    Sums<S, T, V> sum = {};
    for (int i = 0; i < count; ++i) {
      const GradRun& run = runs[i];
      for (int y = run.row; y < run.end; ++y) {
        const float* image = run.image + lane + y * steps.image_row;
        int64_t at = y * steps.plane_row;
        if constexpr (S == 1) {
          row<false, 0, 1>(sum, steps, image, run, at, g.OW, false);
        } else {
          if constexpr (OnImage) {
            image -= line + conv.pixel;
          } else {
            at -= plane_width + 1;
          }
          const bool below = y * g.stride + 1 >= g.H;
          if (y > 0 && !below) {
            row<OnImage, 0, 3>(sum, steps, image, run, at, g.OW, right);
          } else if (y > 0) {
            row<OnImage, 0, 2>(sum, steps, image, run, at, g.OW, right);
          } else if (!below) {
            row<OnImage, 1, 3>(sum, steps, image, run, at, g.OW, right);
          } else {
            row<OnImage, 1, 2>(sum, steps, image, run, at, g.OW, right);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      if (t >= planes) break;
#pragma GCC unroll 9
      for (int tap = 0; tap < S * S; ++tap) {
        float* to = sums[t] + (mirrored ? S * S - 1 - tap : tap) * kBlock + lane;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          store<L>(to + v * L, load<L>(to + v * L) + sum.at[t][tap / S][tap % S][v]);
        }
      }
    }
  }

  template <int V>
  static void vectors(const GradConv& conv, const GradRun* runs, int count, int planes, int lane, float* const* sums) {
    if (conv.size.S == 1) {
      tile<false, 1, 8, V>(conv, runs, count, planes, lane, sums);
    } else if (conv.input_lanes && conv.size.stride > 1) {
      tile<true, 3, 1, V>(conv, runs, count, planes, lane, sums);
    } else {
      tile<false, 3, 1, V>(conv, runs, count, planes, lane, sums);
    }
  }

  static void run(const GradConv& conv, const GradRun* runs, int count, int planes, float* const* sums) {
    int lane = 0;
    for (; lane + kVectors * L <= conv.lanes; lane += kVectors * L) {
      vectors<kVectors>(conv, runs, count, planes, lane, sums);
    }
    for (; lane < conv.lanes; lane += L) vectors<1>(conv, runs, count, planes, lane, sums);
  }
};

}  // namespace gatedkernels
