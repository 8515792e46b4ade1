// The kernels of kernels.h for bfloat16 in memory, which processors with AVX512-BF16 have. Sums are in float32, and the
// hidden activation between the two kernels is rounded once.
// A plane holds a pair of channels, interleaved: the listed channels 0 and 1, 2 and 3, …, an odd last one with zeros.
#pragma once

#include "cpu/kernels.h"

namespace gatedkernels {

struct Bf16 {
  uint16_t bits;
};

struct Bf16Kernels {
  // As in Kernels; planes points at the plane of the first listed channel, which is the first of its pair.
  void (*out_rows)(const OutConvOf<Bf16>&, const Bf16* x, const int32_t* channels, int count, int listed, int row,
                   int end, Bf16* planes);
  int (*channels_together)(int width);  // as in Kernels
  // As in Kernels; x holds planes, channel_step is from pair to pair.
  void (*in_rows)(const InConvOf<Bf16>&, const Bf16* x, const int32_t* channels, int count, int block, int last,
                  int row, int end, const Bf16* residual, Bf16* y);
  // As in Kernels, all channels of the image or all planes; C is even. Components are pairs of channels, one a float.
  void (*image_tiles)(const TileGrid&, Strip, const Bf16* x, int64_t C, const Components&, float* scratch);
  void (*plane_tiles)(const TileGrid&, Strip, const Bf16* planes, int64_t plane, int pairs, const Components&,
                      float* scratch);
  // As in Kernels.
  void (*out_tiles)(const OutConvOf<Bf16>&, const TileGrid&, Strip, const Components&, const int32_t* channels,
                    int count, int listed, Bf16* planes, float* scratch);
  void (*in_tiles)(const InConvOf<Bf16>&, const TileGrid&, Strip, const Components&, const int32_t* channels, int count,
                   int block, int last, const Bf16* residual, Bf16* y, float* scratch);
  // As in Kernels.
  void (*stem_rows)(const StemConvOf<Bf16>&, const Bf16* padded, int rows, Bf16* y);
  void (*add_pixels)(const Bf16* x, int64_t pixels, int64_t step, int64_t C, float* sum);
  void (*max_pixels)(const Bf16* const* pixels, int count, int64_t C, Bf16* y);
};

#if defined(__x86_64__)
extern const Bf16Kernels kAvx512Bf16Kernels;
#endif

// The kernels that this processor runs, or null; see `kernels` for GATEDKERNELS_ISA.
const Bf16Kernels* bf16_kernels();

}  // namespace gatedkernels
