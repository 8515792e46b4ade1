// A whole residual block as one operator: the gate, the shortcut, and the block that they lead to. Every call by way of
// Python fetches the code that leads there, which the weights of the layer before have driven out of the caches.
#include "residual.h"

#include <memory>

#include "block.h"
#include "gate.h"

namespace gatedkernels {

Tensor packed_residual(const Tensor& x, const Tensor& gate_weight1, const Tensor& gate_bias1,
                       const Tensor& gate_weight2, const Tensor& gate_bias2, const Tensor& weight1, const Tensor& bias1,
                       const Tensor& weight2, const Tensor& bias2, const MaybeTensor& tiles1, const MaybeTensor& tiles2,
                       const MaybeTensor& shortcut_weight, const MaybeTensor& shortcut_bias, const MaybeTensor& mask,
                       int64_t stride) {
  STD_TORCH_CHECK(shortcut_weight.has_value() == shortcut_bias.has_value(), "a shortcut has weights and a bias");
  const int64_t N = x.size(0), M = gate_weight2.size(0);
  const auto decided = std::make_unique<bool[]>(N * M);
  decide(x, gate_weight1, gate_bias1, gate_weight2, gate_bias2, decided.get());
  const Plan plan = mask ? Plan(*mask) : Plan(decided.get(), N, M);
  const MaybeTensor residual = shortcut_weight ? MaybeTensor() : MaybeTensor(x);
  return block_and_shortcut(x, weight1, bias1, weight2, bias2, tiles1, tiles2, plan, residual, shortcut_weight,
                            shortcut_bias, stride);
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("packed_residual", TORCH_BOX(&gatedkernels::packed_residual));
}
