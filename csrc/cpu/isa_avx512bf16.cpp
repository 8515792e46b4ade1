// The kernels for processors with AVX512-BF16.
#if defined(__x86_64__)

// Before the instruction set is raised, so that no shared inline function is compiled with it.
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <utility>

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

#include "cpu/bfloat16.h"
#include "cpu/in_rows.h"
#include "cpu/out_rows.h"
#include "cpu/pair_tiles.h"
#include "cpu/stem_rows.h"

namespace gatedkernels {

const Bf16Kernels kAvx512Bf16Kernels = {OutRows<BFloat16>::run,
                                         OutRows<BFloat16>::channels_together,
                                         InRows<BFloat16>::run,
                                         PairTiles::from_image,
                                         PairTiles::from_planes,
                                         OutPairTiles::run,
                                         InPairTiles::run,
                                         StemRows<BFloat16>::run,
                                         BFloat16::add_pixels,
                                         BFloat16::max_pixels};

}  // namespace gatedkernels

#endif
