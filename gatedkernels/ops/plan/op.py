"""From mask to work: the active channels of every sample, listed and counted."""

import torch
from torch import Tensor

from gatedkernels import _extension, policy
from gatedkernels.ops.plan.reference import plan_reference


def _launch(mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.device.type == "cuda" and _extension.CUDA_ERROR is None:
        return torch.ops.gatedkernels.plan_cuda(mask)
    if mask.device.type == "cuda" and policy.triton_problem(mask.new_empty(0, dtype=torch.float32)) is None:
        from gatedkernels.ops.ragged import launch  # importing the package imports no Triton

        indices, counts, _ = launch.plan(mask)
        assert indices is not None and counts is not None
        return indices, counts
    return plan_reference(mask)


# The compiled library is the CPU's implementation where it is loaded.
torch.library.impl("gatedkernels::plan", "CUDA" if _extension.CPU_ERROR is None else ("CPU", "CUDA"), _launch)


def _fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[0], dtype=torch.int32)


for _name in ("plan", "plan_cpu", "plan_cuda"):
    torch.library.register_fake(f"gatedkernels::{_name}", _fake)


def plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the active channels of every sample.

    Args:
        mask: Decisions, bool, shape (N, C).

    Returns:
        ``index``, int32, shape (N, C): row n is a permutation of the channels, first the active ones of sample n in
        ascending order, then the others in ascending order; and ``count``, int32, shape (N,): how many are active.

    Raises:
        TypeError: If ``mask`` is no bool tensor.
        ValueError: If ``mask`` has another number of dimensions.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a tensor of dtype torch.bool, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape (N, C), got {tuple(mask.shape)}")
    return torch.ops.gatedkernels.plan.default(mask)
