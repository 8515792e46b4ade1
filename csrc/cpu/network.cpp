// A residual network as one operator, from its images to the features that its last pooling leaves. Every call by way
// of Python fetches the code that leads there, which the weights of the layer before have driven out of the caches: at
// batch 1 that is a tenth of the network's time.
#include <algorithm>
#include <vector>

#include "block.h"
#include "gate.h"
#include "residual.h"
#include "stem.h"

namespace gatedkernels {
namespace {

// The tensors of one residual block, in the order of packed_residual's arguments.
struct Parts {
  static constexpr size_t kMany = 12;
  const MaybeTensor *gate_weight1, *gate_bias1, *gate_weight2, *gate_bias2;  // all null: no gate
  const MaybeTensor *weight1, *bias1, *weight2, *bias2, *tiles1, *tiles2, *shortcut_weight, *shortcut_bias;

  explicit Parts(const MaybeTensor* p)
      : gate_weight1(p), gate_bias1(p + 1), gate_weight2(p + 2), gate_bias2(p + 3), weight1(p + 4), bias1(p + 5),
        weight2(p + 6), bias2(p + 7), tiles1(p + 8), tiles2(p + 9), shortcut_weight(p + 10), shortcut_bias(p + 11) {
    STD_TORCH_CHECK(*weight1 && *bias1 && *weight2 && *bias2, "a block has two convolutions");
    STD_TORCH_CHECK(!*gate_weight1 || (*gate_bias1 && *gate_weight2 && *gate_bias2), "a gate has two layers");
    STD_TORCH_CHECK(shortcut_weight->has_value() == shortcut_bias->has_value(), "a shortcut has weights and a bias");
  }
};

Tensor everything_open(int64_t N, int64_t channels) {
  Tensor mask = empty({N, channels}, ScalarType::Bool);
  std::fill_n(mask.mutable_data_ptr<bool>(), mask.numel(), true);
  return mask;
}

Tensor run(const Parts& block, const Tensor& x, const MaybeTensor& given, int64_t stride) {
  if (*block.gate_weight1) {
    return packed_residual(x, **block.gate_weight1, **block.gate_bias1, **block.gate_weight2, **block.gate_bias2,
                           **block.weight1, **block.bias1, **block.weight2, **block.bias2, *block.tiles1,
                           *block.tiles2, *block.shortcut_weight, *block.shortcut_bias, given, stride);
  }
  return block_and_shortcut(x, **block.weight1, **block.bias1, **block.weight2, **block.bias2, *block.tiles1,
                            *block.tiles2, Plan(given ? *given : everything_open(x.size(0), (*block.weight1)->size(0))),
                            *block.shortcut_weight ? MaybeTensor() : MaybeTensor(x), *block.shortcut_weight,
                            *block.shortcut_bias, stride);
}

}  // namespace

// `stem`: stride, padding, and whether a ReLU and a pooling follow. `parts`: Parts::kMany of every block.
Tensor packed_network(const Tensor& images, const Tensor& stem_weight, const Tensor& stem_bias,
                      const MaybeTensor& stem_tiles, const std::vector<int64_t>& stem,
                      const std::vector<MaybeTensor>& parts, const std::vector<MaybeTensor>& masks,
                      const std::vector<int64_t>& strides) {
  STD_TORCH_CHECK(stem.size() == 4 && parts.size() == Parts::kMany * strides.size() && masks.size() == strides.size(),
                  "a stem has four numbers; a block has twelve parts, a mask or none, and a stride");
  Tensor x = packed_stem(images, stem_weight, stem_bias, stem[0], stem[1], stem[2] != 0, stem[3] != 0, stem_tiles);
  for (size_t i = 0; i < strides.size(); ++i) {
    x = run(Parts(&parts[Parts::kMany * i]), x, masks[i], strides[i]);
  }
  return packed_pool(x);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) { m.impl("packed_network", TORCH_BOX(&gatedkernels::packed_network)); }
