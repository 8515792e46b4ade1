"""Batch normalisation folded into the convolution before it."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatedkernels._checks import check_type


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a normalisation is, right now, an affine map of each channel: absent, or using running statistics."""
    if norm is None:
        return True
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Fold a batch normalisation into the convolution before it.

    Computed in float32 or wider and rounded once. Gradients pass through.

    Args:
        weight: Filters, shape (K, ...).
        bias: Shape (K,), or None.
        norm: Batch normalisation of K channels with running statistics; None leaves weight and bias as they are.

    Returns:
        Weight and bias of the one convolution that does the same, in the dtype of ``weight``.

    Raises:
        TypeError: If weight or bias is no tensor.
        ValueError: If the normalisation is not an affine map of each channel, or of another number of them.
    """
    check_type("weight", weight, Tensor, "a tensor")
    if bias is not None:
        check_type("bias", bias, Tensor, "a tensor or None")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if norm is None:
        return weight, bias
    if not is_foldable(norm):
        raise ValueError(f"norm must be a batch normalisation that uses running statistics, got {norm}")
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    if norm.num_features != weight.shape[0]:
        raise ValueError(f"norm must have {weight.shape[0]} channels as weight, got {norm}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide) * scale
    folded = weight.to(wide) * scale.view(-1, *[1] * (weight.ndim - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)
