"""The definition of ``gated_block``, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d

from gatedkernels.ops.gated_conv2d.reference import masked


def gated_block_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
) -> Tensor:
    """``relu(conv2(where(mask, relu(conv1(x) + bias1), 0)) + bias2 + residual)``, both convolutions 3x3."""
    hidden = masked(conv2d(x, weight1, bias1, list(stride), 1).relu(), mask)
    y = conv2d(hidden, weight2, bias2, 1, 1)
    return (y if residual is None else y + residual).relu()
