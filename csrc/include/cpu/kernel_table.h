// All kernels for L lanes.
#pragma once

#include "cpu/columns.h"
#include "cpu/finish_rows.h"
#include "cpu/gate_rows.h"
#include "cpu/grad_rows.h"
#include "cpu/in_rows.h"
#include "cpu/in_tiles.h"
#include "cpu/linear_rows.h"
#include "cpu/numbers.h"
#include "cpu/out_rows.h"
#include "cpu/out_tiles.h"
#include "cpu/spread_rows.h"
#include "cpu/stem_rows.h"
#include "cpu/stem_tiles.h"

namespace gatedkernels {

template <int L>
constexpr Kernels kernels_of(const char* name) {
  return {name,
          OutRows<Float32<L>>::run,
          OutRows<Float32<L>>::channels_together,
          InRows<Float32<L>>::run,
          Tiles<L>::from_image,
          Tiles<L>::from_planes,
          OutTiles<L>::run,
          InTiles<L>::run,
          StemRows<Float32<L>>::run,
          StemTiles<L>::run,
          GateRows<L>::add_pixels,
          GateRows<L>::max_pixels,
          FinishRows<L>::run,
          GateRows<L>::template linear<float>,
          GateRows<L>::template linear<uint16_t>,
          LinearRows<L>::panel,
          LinearRows<L>::gather_rows,
          LinearRows<L>::spread,
          GradRows<L>::run,
          SpreadRows<L>::run,
          Columns<L>::gather};
}

}  // namespace gatedkernels
