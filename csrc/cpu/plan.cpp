// From mask to work: the active channels of every sample, listed and counted, the closed ones after them.
#include "tensors.h"

namespace gatedkernels {

std::tuple<Tensor, Tensor> plan(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2, "mask is bool and has two dimensions");
  const Tensor from = row_major(mask);
  const int64_t samples = mask.size(0), channels = mask.size(1);
  Tensor index = empty({samples, channels}, ScalarType::Int), count = empty({samples}, ScalarType::Int);
  const bool* open = from.const_data_ptr<bool>();
  int32_t* list = index.mutable_data_ptr<int32_t>();
  int32_t* counts = count.mutable_data_ptr<int32_t>();
  for (int64_t n = 0; n < samples; ++n, open += channels, list += channels) {
    int32_t active = 0;
    for (int64_t c = 0; c < channels; ++c) {
      if (open[c]) list[active++] = static_cast<int32_t>(c);
    }
    counts[n] = active;
    for (int64_t c = 0; c < channels; ++c) {
      if (!open[c]) list[active++] = static_cast<int32_t>(c);
    }
  }
  return {index, count};
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("plan", TORCH_BOX(&gatedkernels::plan));
  m.impl("plan_cpu", TORCH_BOX(&gatedkernels::plan));
}
