#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace gatedkernels {

// Index int32 (N, groups * C) and count int32 (N * groups,) of a mask (N, groups * C): each group of each sample lists
// its own channels, counted from the group's first. The caller has made the mask's device current.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> PlanGroups(const torch::stable::Tensor& mask, int64_t groups);

}  // namespace gatedkernels
