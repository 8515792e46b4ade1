"""The definition of ``conv_out``, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d

from gatedkernels.ops.plan.reference import pack


def conv_out_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    """The convolution's active output channels of every sample, packed; zeros after them."""
    y = conv2d(x, weight, bias, list(stride), list(padding), list(dilation))
    return pack(y.relu() if relu else y, index, count)
