// Convolutions with a width for every sample on Winograd's components: a width is a plan without a list, so that the
// in-gated kernel serves, its first channels instead of listed ones. Filters are transformed at each call.
#include "sliced_tiles.h"

#include <algorithm>
#include <cstring>

#include "conv.h"
#include "strips.h"

namespace gatedkernels {
namespace {

constexpr int kFilter = 9 * kBlock;  // floats of an input channel in a block of packed filters

// Kernel (3, 3) to components (4, 4), lane by lane, into four rows of four, `quarter` floats apart.
void transform(const float* filter, float* components, int64_t quarter) {
  float rows[4][3][kBlock];
  for (int s = 0; s < 3; ++s) {
    const float *a = filter + s * kBlock, *b = a + 3 * kBlock, *c = b + 3 * kBlock;
    for (int lane = 0; lane < kBlock; ++lane) {
      const float outer = 0.5f * (a[lane] + c[lane]), inner = 0.5f * b[lane];
      rows[0][s][lane] = a[lane], rows[1][s][lane] = outer + inner;
      rows[2][s][lane] = outer - inner, rows[3][s][lane] = c[lane];
    }
  }
  for (int r = 0; r < 4; ++r) {
    float* to = components + r * quarter;
    for (int lane = 0; lane < kBlock; ++lane) {
      const float a = rows[r][0][lane], b = rows[r][1][lane], c = rows[r][2][lane];
      const float outer = 0.5f * (a + c), inner = 0.5f * b;
      to[lane] = a, to[kBlock + lane] = outer + inner;
      to[2 * kBlock + lane] = outer - inner, to[3 * kBlock + lane] = c;
    }
  }
}

// Packed filters (blocks, C, 3, 3, kBlock) as in_tiles takes them, of the first `most` input channels.
Tensor transformed(const float* from, int64_t blocks, int64_t C, int64_t most) {
  const int64_t quarter = C * kTileRow;
  Tensor tiles = empty({blocks, 4, C, kTileRow});
  float* to = tiles.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, blocks * most, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / most, c = i % most;
      transform(from + (block * C + c) * kFilter, to + block * 4 * quarter + c * kTileRow, quarter);
    }
  });
  return tiles;
}

// Zeros in the channels [width, K) of the pixels of a strip.
void close_beyond(const TileGrid& grid, Strip strip, int64_t width, int64_t K, float* y) {
  if (width == K) return;
  const Geometry& g = grid.size;
  for (int tile = strip.first; tile < strip.last; ++tile) {
    const int row = 2 * (tile / grid.columns), column = 2 * (tile % grid.columns);
    for (int r = row; r < std::min(row + 2, g.OH); ++r) {
      for (int c = column; c < std::min(column + 2, g.OW); ++c) {
        std::memset(y + (int64_t{r} * g.OW + c) * K + width, 0, (K - width) * sizeof(float));
      }
    }
  }
}

}  // namespace

bool sliced_tiles_pay(const Tensor& x, const Tensor& weight, int64_t stride, const Plan* ins, const Plan* outs) {
  // Costs in multiply-adds, by rows of weights and on tiles, measured on Zen 4: those of a tile, and of transforming a
  // filter, for each input and output channel.
  constexpr double kTile = 20, kTransform = 1050;
  const int64_t C = x.size(1), K = weight.size(0), most = ins ? ins->most() : C;
  if (weight.size(2) != 3 || stride != 1) return false;
  const TileGrid grid(geometry(x, 3, 1));
  const int64_t image = C * x.size(2) * x.size(3);
  if (!in_tiles_pay(grid, static_cast<int32_t>(most), x.size(0), image)) return false;
  double pairs = 0;
  for (int64_t n = 0; n < x.size(0); ++n) {
    pairs += static_cast<double>(ins ? ins->count[n] : C) * static_cast<double>(outs ? outs->count[n] : K);
  }
  return pairs * (taps_inside(grid.size) - kTile * grid.tiles()) >
         kTransform * static_cast<double>(most * (outs ? outs->most() : K));
}

Tensor sliced_on_tiles(const Tensor& given_x, const float* filters, const float* bias, int64_t K, const Plan* ins,
                       const Plan* outs) {
  const Tensor x = channels_last(given_x);
  const TileGrid grid(geometry(x, 3, 1));
  const Geometry& g = grid.size;
  const int64_t N = x.size(0), C = x.size(1);
  const Strips strips(grid, N, 64);
  const Tensor tiles = transformed(filters, ceil_div(outs ? outs->most() : K, kBlock), C, ins ? ins->most() : C);
  const InConv conv = in_conv(x, g, floats(tiles), bias, K, false, false);
  const Kernels& run = kernels_for(K);
  Tensor y = empty({N, K, g.OH, g.OW}, ScalarType::Float, MemoryFormat::ChannelsLast);
  float* const out = y.mutable_data_ptr<float>();
  in_order(N * strips.count, [&](int64_t item) {
    const int64_t n = item / strips.count;
    const Strip strip = strips.at(static_cast<int>(item % strips.count));
    const int32_t count = ins ? ins->count[n] : static_cast<int32_t>(C);
    const int64_t width = outs ? outs->count[n] : K;
    float* const image = out + n * g.OH * g.OW * K;
    ThreadTiles& mine = ThreadTiles::mine();
    mine.reserve(Components::floats(C, strips.widest()), tile_scratch(grid, strips.widest()));
    if (width > 0) {
      const Components components(mine.components, std::max(count, 1), strip.tiles());
      run.image_tiles(grid, strip, floats(x) + n * g.H * g.W * C, C, 0, count, components, mine.scratch);
      run.in_tiles(conv, grid, strip, components, nullptr, count, 0, static_cast<int>(ceil_div(width, kBlock)), nullptr,
                   image, mine.scratch);
    }
    close_beyond(grid, strip, width, K, image);
  });
  return y;
}

}  // namespace gatedkernels
