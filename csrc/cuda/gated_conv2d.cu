// N batch, C in-channels, K out-channels, H W image, R S window, P Q output image
#include "../include/cuda/gated_conv2d.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "plan.h"
#include "stream.h"

namespace gatedkernels {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool IsChannelsLast(const Tensor& x) {
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (x.size(dim) == 1) continue;
    if (x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// A pure function of x's shape and strides, the same for every backend: what is both counts as contiguous.
MemoryFormat OutputFormat(const Tensor& x) {
  return !x.is_contiguous() && IsChannelsLast(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

int64_t OutputSize(int64_t size, int64_t window, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (window - 1) - 1;
  STD_TORCH_CHECK(room >= 0, "the window must fit into the padded image");
  return room / stride + 1;
}

template <typename T>
void Convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& in_mask, const std::optional<Tensor>& out_mask, Tensor& y,
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
              const std::vector<int64_t>& dilation, int64_t groups) {
  GatedConv2dArguments<T> call{};
  call.x = static_cast<const T*>(x.const_data_ptr());
  call.weight = static_cast<const T*>(weight.const_data_ptr());
  call.y = static_cast<T*>(y.mutable_data_ptr());
  if (bias) {
    call.bias = static_cast<const T*>(bias->const_data_ptr());
    call.bias_stride = bias->stride(0);
  }
  // Memory that is freed on return is reused in the order of this stream: after the kernel has read it.
  std::optional<std::tuple<Tensor, Tensor>> in_plan, out_plan;
  if (in_mask) {
    in_plan = PlanGroups(*in_mask, groups);
    call.in_index = static_cast<const int32_t*>(std::get<0>(*in_plan).const_data_ptr());
    call.in_count = static_cast<const int32_t*>(std::get<1>(*in_plan).const_data_ptr());
  }
  if (out_mask) {
    out_plan = PlanGroups(*out_mask, groups);
    call.out_index = static_cast<const int32_t*>(std::get<0>(*out_plan).const_data_ptr());
    call.out_count = static_cast<const int32_t*>(std::get<1>(*out_plan).const_data_ptr());
  }
  call.N = x.size(0);
  call.G = groups;
  call.C = weight.size(1);
  call.K = weight.size(0) / groups;
  call.H = x.size(2);
  call.W = x.size(3);
  call.R = weight.size(2);
  call.S = weight.size(3);
  call.P = y.size(2);
  call.Q = y.size(3);
  call.x_stride_n = x.stride(0);
  call.x_stride_c = x.stride(1);
  call.x_stride_h = x.stride(2);
  call.x_stride_w = x.stride(3);
  call.weight_stride_k = weight.stride(0);
  call.weight_stride_c = weight.stride(1);
  call.weight_stride_r = weight.stride(2);
  call.weight_stride_s = weight.stride(3);
  call.y_stride_n = y.stride(0);
  call.y_stride_k = y.stride(1);
  call.y_stride_p = y.stride(2);
  call.y_stride_q = y.stride(3);
  call.stride_h = stride[0];
  call.stride_w = stride[1];
  call.padding_h = padding[0];
  call.padding_w = padding[1];
  call.dilation_h = dilation[0];
  call.dilation_w = dilation[1];
  LaunchGatedConv2dForward(call, CurrentStream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void CheckMask(const std::optional<Tensor>& mask, const Tensor& x, int64_t channels) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2, "a mask must be bool (N, channels)");
  STD_TORCH_CHECK(mask->size(0) == x.size(0) && mask->size(1) == channels, "a mask must have shape (N, channels)");
  STD_TORCH_CHECK(mask->is_cuda() && mask->get_device_index() == x.get_device_index(),
                  "a mask must be on the device of x");
}

void CheckOperand(const Tensor& operand, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(operand.dim() == dim, "an operand has the wrong number of dimensions");
  STD_TORCH_CHECK(operand.scalar_type() == x.scalar_type(), "all operands must have one dtype");
  STD_TORCH_CHECK(operand.is_cuda() && operand.get_device_index() == x.get_device_index(),
                  "all operands must be on the device of x");
}

Tensor GatedConv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& in_mask, const std::optional<Tensor>& out_mask,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  CheckOperand(x, x, 4);
  CheckOperand(weight, x, 4);
  const int64_t K = weight.size(0);
  STD_TORCH_CHECK(groups > 0 && K % groups == 0 && x.size(1) == weight.size(1) * groups,
                  "groups must divide the channels");
  STD_TORCH_CHECK(std::max(x.size(1), K) <= std::numeric_limits<int32_t>::max(), "channels are counted in 32 bits");
  STD_TORCH_CHECK(weight.size(2) > 0 && weight.size(3) > 0, "the window must not be empty");
  if (bias) {
    CheckOperand(*bias, x, 1);
    STD_TORCH_CHECK(bias->size(0) == K, "bias must have one value for each out-channel");
  }
  CheckMask(in_mask, x, x.size(1));
  CheckMask(out_mask, x, K);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "the geometry is of two dims");
  for (const int dim : {0, 1}) {
    STD_TORCH_CHECK(stride[dim] > 0 && padding[dim] >= 0 && dilation[dim] > 0, "the geometry must be positive");
  }
  const int64_t P = OutputSize(x.size(2), weight.size(2), stride[0], padding[0], dilation[0]);
  const int64_t Q = OutputSize(x.size(3), weight.size(3), stride[1], padding[1], dilation[1]);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty({x.size(0), K, P, Q}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  OutputFormat(x));
  if (y.numel() == 0) return y;
  const auto convolve = [&](auto zero) {
    Convolve<decltype(zero)>(x, weight, bias, in_mask, out_mask, y, stride, padding, dilation, groups);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      convolve(float{});
      break;
    case ScalarType::Double:
      convolve(double{});
      break;
    case ScalarType::Half:
      convolve(__half{});
      break;
    case ScalarType::BFloat16:
      convolve(__nv_bfloat16{});
      break;
    default:
      STD_TORCH_CHECK(false, "x must be float16, bfloat16, float32 or float64");
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CUDA, m) { m.impl("gated_conv2d_cuda", TORCH_BOX(&GatedConv2d)); }

}  // namespace gatedkernels
