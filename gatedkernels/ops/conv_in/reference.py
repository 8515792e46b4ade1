"""The definition of ``conv_in``, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d

from gatedkernels.ops.plan.reference import unpack


def conv_in_reference(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of the unpacked images; what lies beyond count[n] is never read."""
    return conv2d(unpack(packed, index, count), weight, bias, list(stride), list(padding), list(dilation))
