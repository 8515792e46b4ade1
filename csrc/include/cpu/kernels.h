// What the convolution kernels compute, without how: filled in by the callers in csrc/cpu, served by out_rows.h and
// in_rows.h once for every instruction set.
// C input channels, K output channels, H W input and OH OW output sizes, S taps along one side of the window.
#pragma once

#include <cstdint>

namespace gatedkernels {

constexpr int kBlock = 32;  // output channels in one block of packed in-gated weights

struct Geometry {
  int H, W, OH, OW, stride, S;  // S is 1 or 3, the padding S / 2
};

// Out-gated: reads every channel of an NHWC image, writes one plane for each listed output channel.
struct OutConv {
  Geometry size;
  int C;
  const float* weight;  // (K, S, S, C)
  const float* bias;    // (K), or null
  int64_t plane;        // floats from one output plane to the next
  bool relu;
  int ahead = 0;  // how much further down the list this thread will probably go on; 0: nobody knows
};

// In-gated: reads the listed input channels wherever they lie, writes NHWC pixels of all K output channels.
struct InConv {
  Geometry size;
  int C, K;
  const float* weight;  // (K / kBlock, C, S, S, kBlock), zeros where K ends
  const float* bias;    // (K), or null
  int64_t channel_step, row_step, pixel_step;  // floats between neighbours in the input
  bool gathered;  // the input holds all channels (step by the listed ones), or the listed ones only (step by position)
  bool relu;
  int ahead = 0;  // how many blocks further on this thread will probably go on; 0: nobody knows
};

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

constexpr int kChain = 64;  // products that are added one after another, without losing digits

struct Kernels {
  const char* name;
  // Output rows [row, end) of the first `count` listed channels of one sample, `listed` there are in all; planes points
  // at the first listed channel's plane.
  void (*out_rows)(const OutConv&, const float* x, const int32_t* channels, int count, int listed, int row, int end,
                   float* planes);
  // Output rows [row, end) of the blocks [block, last) of output channels; null channels stand for 0, 1, …, count - 1.
  void (*in_rows)(const InConv&, const float* x, const int32_t* channels, int count, int block, int last, int row,
                  int end, const float* residual, float* y);
  // sum[c] += x[p][c] over pixels of C adjacent channels, `step` floats apart.
  void (*add_pixels)(const float* x, int64_t pixels, int64_t step, int64_t C, float* sum);
  // y = weight (K, C) times x, plus bias.
  void (*linear)(const float* weight, const float* bias, const float* x, int64_t C, int64_t K, float* y);
  void (*linear_panel)(const LinearPanel&);
  // panel[c][l] = rows[l][c] for kBlock rows.
  void (*gather_rows)(const float* const* rows, int64_t inputs, float* panel);
  void (*spread_units)(const SpreadUnits&);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best kernels that this processor runs; GATEDKERNELS_ISA (portable, avx2, avx512) caps the choice.
const Kernels& kernels();

}  // namespace gatedkernels
