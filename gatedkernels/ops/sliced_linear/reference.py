"""The definition of ``sliced_linear`` with a width for every sample: a gated layer whose masks are prefixes."""

from collections.abc import Sequence

from torch import Tensor

from gatedkernels.ops.gated_linear.reference import gated_linear_backward_reference, gated_linear_reference
from gatedkernels.ops.sliced_conv2d.reference import prefix


def sliced_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    """``linear`` of each sample's first ``in_width`` channels; zeros behind its first ``out_width`` ones."""
    masks = prefix(in_width, x.shape[-1]), prefix(out_width, weight.shape[0])
    return gated_linear_reference(x, weight, bias, *masks)


def sliced_linear_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias."""
    masks = prefix(in_width, x.shape[-1]), prefix(out_width, weight.shape[0])
    return gated_linear_backward_reference(dy, x, weight, *masks, False, output_mask)
