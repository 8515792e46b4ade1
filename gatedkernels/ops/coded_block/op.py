"""The gated basic block of a mask codebook: a table of masks, and which of them every sample has."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._backends import Backend, require
from gatedkernels.ops.gated_block.op import LAUNCHERS, checked, gated_block

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    table: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    y = gated.coded_block(x, weight1, bias1, weight2, bias2, table, codes, residual, stride)
    return y.contiguous(memory_format=arguments.memory_format(x))


# No compiled library has a part in it, and so its schema is not one of theirs.
torch.library.define(
    "gatedkernels::coded_block",
    "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor table, Tensor codes,"
    " Tensor? residual, SymInt[2] stride) -> Tensor",
)
torch.library.impl("gatedkernels::coded_block", ("CPU", "CUDA"), _forward)


@torch.library.register_fake("gatedkernels::coded_block")
def _(x, weight1, bias1, weight2, bias2, table, codes, residual, stride):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
    return x.new_empty((x.shape[0], weight2.shape[0], *size)).to(memory_format=arguments.memory_format(x))


def coded_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    table: Tensor,
    codes: Tensor,
    *,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    group: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Compute a gated basic block whose samples pick their masks from a table.

    `gated_block` with the mask ``table[codes]``, in values and gradients.

    Args:
        x: Images, shape (N, C, H, W), floating, any strides.
        weight1: Filters, shape (M, C, 3, 3), dtype of ``x``.
        bias1: Shape (M,), or None.
        weight2: Filters, shape (K, M, 3, 3).
        bias2: Shape (K,), or None.
        table: The masks of the hidden channels, bool, shape (masks, M / group), at least one.
        codes: Row of the table for every sample, integers, shape (N,).
        residual: Added before the last ReLU, shape (N, K, H', W'), or None.
        stride: Of the first convolution.
        group: Granularity of the masks.
        backend: "reference", "dense", "cpu", "triton", or "auto": the policy's choice. "triton" has one list for each
            row of the table, and one fetch of the weights for several samples of it.

    Returns:
        Shape (N, K, H', W'), as `gated_block` returns it.

    Raises:
        ValueError: If shapes or devices disagree, the table is empty, a code on the CPU is not one of its rows, or the
            backend cannot serve this call.
        TypeError: If dtypes disagree, the table is not bool, or the codes are no integers.
    """
    arguments.check_images("x", x)
    _check_codes(table, codes, x)
    if backend != "triton" or arguments.recorded(x, weight1, bias1, weight2, bias2, residual):
        mask = table[codes.long()]
        return gated_block(
            x, weight1, bias1, weight2, bias2, mask, residual=residual, stride=stride, group=group, backend=backend
        )
    *tensors, residual, strides = checked(x, weight1, bias1, weight2, bias2, residual, stride)
    # A table is checked as the mask of a batch of as many samples.
    one_a_mask = x[:1].expand(len(table), -1, -1, -1)
    masks = arguments.expand_mask("table", table, weight1.shape[0], group, one_a_mask)
    require(backend, LAUNCHERS, x)
    return torch.ops.gatedkernels.coded_block.default(*tensors, masks, codes, residual, strides)


def _check_codes(table: Tensor, codes: Tensor, x: Tensor) -> None:
    for name, tensor in (("table", table), ("codes", codes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if table.ndim != 2 or len(table) == 0:
        raise ValueError(f"table must have shape (masks, channels) with at least one mask, got {tuple(table.shape)}")
    if codes.dtype not in _INTEGERS:
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if tuple(codes.shape) != (x.shape[0],):
        raise ValueError(f"codes must have shape ({x.shape[0]},), got {tuple(codes.shape)}")
    if codes.device.type == "cpu" and len(codes) and not torch.compiler.is_compiling():
        least, most = (int(code) for code in codes.aminmax())
        if least < 0 or most >= len(table):
            raise ValueError(f"codes must be rows of the table, 0 to {len(table) - 1}, got {least} to {most}")
