// What the convolution kernels compute, without how: filled in by the callers in csrc/cpu, served by out_rows.h and
// in_rows.h once for every instruction set.
// C input channels, K output channels, H W input and OH OW output sizes, S taps along one side of the window.
#pragma once

#include <cstdint>

namespace gatedkernels {

constexpr int kBlock = 32;  // output channels in one block of packed in-gated weights
constexpr int kTileRow = 4 * kBlock;  // floats of an input channel in a block of transformed ones, four components each

struct Geometry {
  int H, W, OH, OW, stride, S;  // S is 1 or 3, the padding S / 2
};

// Out-gated: reads the first channels of an NHWC image, writes one plane for each listed output channel.
template <class Element>
struct OutConvOf {
  Geometry size;
  int C = 0;
  const Element* weight;  // (K, S, S, C)
  const Element* bias;    // (K), or null
  int64_t plane;          // elements from one output plane to the next
  bool relu;
  int turns = 0;  // after how many runs of as many channels this thread will probably go on; 0: nobody knows
  int inputs = C;  // channels to read, from the first one on
};

// In-gated: reads the listed input channels wherever they lie, writes NHWC pixels of all K output channels.
template <class Element>
struct InConvOf {
  Geometry size;
  int C, K;
  const Element* weight;  // (K / kBlock, C, S, S, kBlock), zeros where K ends
  const Element* bias;    // (K), or null
  int64_t channel_step, row_step, pixel_step;  // elements between neighbours in the input
  bool gathered;  // the input holds all channels (step by the listed ones), or the listed ones only (step by position)
  bool relu;
  int turns = 0;  // after how many runs of as many blocks this thread will probably go on; 0: nobody knows
  int first = 0;  // block that the weights and the bias begin with
};

using OutConv = OutConvOf<float>;
using InConv = InConvOf<float>;

// The first convolution of a network: every value of a padded NHWC image of few channels to all K output channels.
template <class Element>
struct StemConvOf {
  int C, K, S, stride, OW;
  int64_t line;           // elements of a padded row
  const Element* weight;  // (K / kBlock, S, S * C, kBlock), zeros where K ends
  const Element* bias;
  bool relu;
};

using StemConv = StemConvOf<float>;

// Where the components of a first convolution's padded rows lie; see stem_tiles.h.
struct StemTable {
  static constexpr int kPixels = 3, kComponents = 6, kProducts = kComponents * kBlock * 16;

  int tiles;
  int64_t pitch, split;         // floats from value to value, and from pixel to pixel of a row that is taken apart
  int64_t component, row;       // floats from table to table, and from row to row

  explicit StemTable(const StemConv& conv)
      : tiles((conv.OW + kPixels - 1) / kPixels),
        pitch((tiles + 15) / 16 * 16),
        split(pitch + 16),
        component(2 * conv.C * pitch),
        row(kComponents * component + 16) {}  // not a power of two
  // Memory for the rows that `rows` of the result are made from.
  int64_t scratch(const StemConv& conv, int64_t rows) const {
    return kProducts + split * 2 * kPixels * conv.C + ((rows - 1) * conv.stride + conv.S) * row;
  }
};

// The tiles of 2 x 2 output pixels of a 3 x 3 convolution of stride 1, row by row; see tiles.h.
struct TileGrid {
  Geometry size;
  int rows, columns;

  explicit TileGrid(const Geometry& g) : size(g), rows((g.OH + 1) / 2), columns((g.OW + 1) / 2) {}
  int tiles() const { return rows * columns; }
};

// Tiles [first, last).
struct Strip {
  int first, last;
  int tiles() const { return last - first; }
};

// Whether a strip ends with the tile in the corner of an image of odd height and width, and this tile would have a
// vector to itself: it is computed apart then, as the one pixel that it holds.
inline bool has_lone_corner(const TileGrid& grid, Strip strip) {
  const bool ends_alone = strip.last == grid.tiles() && strip.tiles() % 8 == 1 && strip.tiles() > 1;
  return grid.size.OH % 2 && grid.size.OW % 2 && ends_alone;
}

// Where the 16 components of some channels and a strip of tiles lie, and behind them those that a lone corner needs.
struct Components {
  static constexpr int kCorner = 9;  // components that the first pixel of a tile is the sum of

  float* data;
  int64_t pitch;     // floats from channel to channel
  int64_t step;      // floats from component to component
  int64_t channels;  // floats from component to component of the corner

  static int64_t pitch_of(int64_t tiles) { return (tiles + 15) / 16 * 16; }
  // Not a power of two.
  static int64_t step_of(int64_t channels, int64_t tiles) { return channels * pitch_of(tiles) + 16; }
  static int64_t floats(int64_t channels, int64_t tiles) { return 16 * step_of(channels, tiles) + kCorner * channels; }

  Components(float* data_, int64_t channels_, int64_t tiles)
      : data(data_), pitch(pitch_of(tiles)), step(step_of(channels_, tiles)), channels(channels_) {}
  float* row(int component, int channel) const { return data + component * step + channel * pitch; }
  float* corner(int row, int column) const { return data + 16 * step + (3 * row + column) * channels; }
};

// Floats of scratch memory that the kernels on tiles need for a strip of so many tiles.
inline int64_t tile_scratch(const TileGrid& grid, int64_t tiles) {
  // Of split pixels: a strip may begin inside a row.
  const int64_t rows = (tiles + grid.columns - 2) / grid.columns + 2;
  const int64_t table = (rows * (grid.columns + 1) + 15) / 16 * 16;
  const int64_t splitting = 16 * (4 * table + 16) + 4 * table, multiplying = 148 * Components::pitch_of(tiles);
  constexpr int64_t kGathering = 16 * 36 * 32;
  return splitting + multiplying + kGathering;
}
// Linear: some tokens times one panel of at most kBlock units.
struct LinearPanel {
  const float* x;  // rows of tokens
  int64_t x_step;
  int tokens;
  const int32_t* inputs;  // the listed inputs; null: 0, 1, …, count - 1
  int count;
  const float* weight;  // rows of kBlock units
  bool shared;          // there is a row for every input of the layer, or one for every listed input
  const float* bias;    // kBlock floats
  bool add;             // to what y holds, instead of the bias
  float* y;
  int64_t y_step;
  int units;  // to write
};

// Linear: columns [from, to) of the output: the listed units, which lie packed, and zeros between them.
struct SpreadUnits {
  const float* packed;  // rows of tokens; some floats are read behind the last one
  int64_t step, tokens;
  const int32_t* units;
  int count;
  int64_t from, to;
  float* y;
  int64_t y_step;
};

// Gradients of filters: an NHWC image, along whose channels lanes run, times planes of single channels, summed over the
// pixels. One of the two is the input of the convolution, the other one belongs to its output.
struct GradConv {
  Geometry size;
  bool input_lanes;  // the image is the input and the planes belong to the output, or the other way round
  int lanes;         // channels of the image from here on that are meant, at most kBlock
  int64_t pixel;     // floats from pixel to pixel of the image
  int planes() const { return size.S == 1 ? 8 : 1; }  // that are computed together
};

// Rows [row, end) of the convolution's output in one sample.
struct GradRun {
  const float* image;      // its first pixel
  const float* plane[8];   // first pixels of GradConv::planes() planes, or of fewer, the last ones repeated
  int row, end;
};

constexpr int kChain = 64;  // products that are added one after another, without losing digits

struct Kernels {
  const char* name;
  // Output rows [row, end) of the first `count` listed channels of one sample, `listed` there are in all; planes points
  // at the first listed channel's plane.
  void (*out_rows)(const OutConv&, const float* x, const int32_t* channels, int count, int listed, int row, int end,
                   float* planes);
  int (*channels_together)(int width);  // of listed channels, in rows of so many pixels
  // Output rows [row, end) of the blocks [block, last) of output channels; null channels stand for 0, 1, …, count - 1.
  void (*in_rows)(const InConv&, const float* x, const int32_t* channels, int count, int block, int last, int row,
                  int end, const float* residual, float* y);
  // Channels [from, to) of an NHWC image, or of planes, to components.
  void (*image_tiles)(const TileGrid&, Strip, const float* x, int64_t C, int from, int to, const Components&,
                      float* scratch);
  void (*plane_tiles)(const TileGrid&, Strip, const float* planes, int64_t plane, int from, int to, const Components&,
                      float* scratch);
  // out_rows and in_rows for a strip of tiles, from components; weights transformed: (K, 16, C) with 16 more floats at
  // the end of each row, and (K / kBlock, 4, C, 4, kBlock): four components at a time.
  void (*out_tiles)(const OutConv&, const TileGrid&, Strip, const Components&, const int32_t* channels, int count,
                    int listed, float* planes, float* scratch);
  void (*in_tiles)(const InConv&, const TileGrid&, Strip, const Components&, const int32_t* channels, int count,
                   int block, int last, const float* residual, float* y, float* scratch);
  // `rows` output rows, from the padded rows that they read.
  void (*stem_rows)(const StemConv&, const float* padded, int rows, float* y);
  // The same on tiles, where S is 7 and the stride 2; weights transformed: (K / kBlock, 6, 7, 2 C, kBlock).
  void (*stem_tiles)(const StemConv&, const float* padded, int rows, float* scratch, float* y);
  // sum[c] += x[p][c] over pixels of C adjacent channels, `step` floats apart.
  void (*add_pixels)(const float* x, int64_t pixels, int64_t step, int64_t C, float* sum);
  // y[c] = the largest pixels[p][c] of `count` pixels.
  void (*max_pixels)(const float* const* pixels, int count, int64_t C, float* y);
  // y = x + residual, if there is one; rectified if `relu`; and zero where a number of `open` is, if there are any: those
  // of open channels have all bits set.
  void (*finish_row)(const float* x, const float* residual, const int32_t* open, bool relu, int64_t count, float* y);
  // y[n] = weight (K, C) times x[n], plus bias, for samples that follow each other.
  void (*linear)(const float* weight, const float* bias, const float* x, int64_t samples, int64_t C, int64_t K,
                 float* y);
  // The same of weights that are the bits of bfloat16.
  void (*linear_narrow)(const uint16_t* weight, const float* bias, const float* x, int64_t samples, int64_t C,
                        int64_t K, float* y);
  void (*linear_panel)(const LinearPanel&);
  // panel[c][l] = rows[l][c] for kBlock rows.
  void (*gather_rows)(const float* const* rows, int64_t inputs, float* panel);
  void (*spread_units)(const SpreadUnits&);
  // sums[p][tap][lane] += the products of all runs, for the first `planes` planes; rows of kBlock lanes.
  void (*grad_rows)(const GradConv&, const GradRun* runs, int count, int planes, float* const* sums);
  // The input's gradient of a 3 x 3 convolution of stride 2: pairs of rows [row, end), one block of its channels, from
  // planes of the gradient of its output. `size` is that of the convolution, C its output and K its input channels; the
  // weights are those for in_rows, turned round.
  void (*spread_rows)(const InConv&, const float* planes, const int32_t* channels, int count, int block, int row,
                      int end, float* y);
  // One block of 3 x 3 weights for in_rows, (count, 3, 3, kBlock), of listed inputs and of `many` listed outputs, which
  // ascend, zeros behind them; from weights for in_rows of C inputs. Null inputs stand for 0, 1, …, count - 1.
  void (*gather_columns)(const float* weight, int64_t C, const int32_t* inputs, int count, const int32_t* outputs,
                         int many, float* block);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best kernels that this processor runs; GATEDKERNELS_ISA (portable, avx2, avx512, avx512bf16) caps the choice.
const Kernels& kernels();

// Those for lanes along so many channels: shorter vectors where they fill and the longest would not.
const Kernels& kernels_for(int64_t channels);

}  // namespace gatedkernels
