// N batch, C channels
#include "../include/cuda/plan.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "plan.h"
#include "stream.h"

namespace gatedkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> PlanGroups(const Tensor& mask, int64_t groups) {
  STD_TORCH_CHECK(mask.is_cuda() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 2,
                  "mask must be bool (N, C) on CUDA");
  const int64_t N = mask.size(0);
  const int64_t C = mask.size(1);
  STD_TORCH_CHECK(groups > 0 && C % groups == 0, "groups must divide the mask's channels");
  STD_TORCH_CHECK(C <= std::numeric_limits<int32_t>::max(), "channels are counted in 32 bits");
  Tensor index = torch::stable::empty({N, C}, ScalarType::Int, std::nullopt, mask.device());
  Tensor count = torch::stable::empty({N * groups}, ScalarType::Int, std::nullopt, mask.device());
  PlanArguments call;
  call.mask = static_cast<const bool*>(mask.const_data_ptr());
  call.index = static_cast<int32_t*>(index.mutable_data_ptr());
  call.count = static_cast<int32_t*>(count.mutable_data_ptr());
  call.N = N;
  call.G = groups;
  call.C = C / groups;
  call.stride_n = mask.stride(0);
  call.stride_c = mask.stride(1);
  LaunchPlanForward(call, CurrentStream(mask));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {index, count};
}

namespace {

std::tuple<Tensor, Tensor> Plan(const Tensor& mask) {
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  return PlanGroups(mask, 1);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CUDA, m) { m.impl("plan_cuda", TORCH_BOX(&Plan)); }

}  // namespace gatedkernels
