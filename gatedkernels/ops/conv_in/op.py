"""The in-gated convolution: reads packed channels and the matching filters."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._backends import Backend, cpu_or_reference, refuse
from gatedkernels.ops.conv_in.reference import conv_in_reference
from gatedkernels.ops.plan.reference import mask_of, pack, unpack


def _launch_cpu(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    refuse("cpu", policy.cpu_problem(packed, weight, stride, padding, dilation, 1))
    return torch.ops.gatedkernels.conv_in_cpu(packed, weight, bias, index, count, stride[0])


def _launch_triton(*args: Any) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    return gated.conv_in(*args)


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": conv_in_reference,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


def _forward(*args: Any) -> Tensor:
    *tensors_and_geometry, _, backend = args
    return LAUNCHERS[backend](*tensors_and_geometry).contiguous()


torch.library.impl("gatedkernels::conv_in", ("CPU", "CUDA"), _forward)


@torch.library.register_fake("gatedkernels::conv_in")
def _(packed, weight, bias, index, count, stride, padding, dilation, dense_input_grad, backend):  # type: ignore[no-untyped-def]
    size = arguments.output_size(packed, weight, stride, padding, dilation)
    return packed.new_empty((packed.shape[0], weight.shape[0], *size))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    packed, weight, _, index, count, *ctx.options = inputs
    ctx.save_for_backward(packed, weight, index, count)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    packed, weight, index, count = ctx.saved_tensors
    stride, padding, dilation, dense_input_grad, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    dx, dweight, dbias = torch.ops.gatedkernels.gated_conv2d_backward.default(
        dy,
        unpack(packed, index, count),
        weight,
        mask_of(index, count),
        None,
        stride,
        padding,
        dilation,
        1,
        dense_input_grad,
        needs,
        backend,
        1.0,
    )
    # In the order of the plan: the active channels first, then, where asked for, those of the closed ones.
    every = torch.full_like(count, index.shape[1]) if dense_input_grad else count
    dpacked = pack(dx, index, every) if needs[0] else None
    return dpacked, dweight if needs[1] else None, dbias if needs[2] else None, *(None,) * 7


torch.library.register_autograd("gatedkernels::conv_in", _backward, setup_context=_save)


def conv_in(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    dense_input_grad: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve packed channels with the filters that belong to them.

    Args:
        packed: Packed images, shape (N, C, H, W): what ``conv_out`` returns. Channels from count[n] on are never read.
        weight: Filters, shape (K, C, R, S), dtype of ``packed``.
        bias: Shape (K,), or None.
        index: Int32, shape (N, C), from ``plan``: packed channel j < count[n] is channel index[n, j].
        count: Int32, shape (N,), from ``plan``.
        stride: Pixels between windows, along H and W.
        padding: Zero pixels added on every side.
        dilation: Pixels between the taps of a window.
        dense_input_grad: The gradient of ``packed`` also fills the positions from count[n] on, with the gradients of
            the closed channels in the plan's order, as if nothing were closed.
        backend: "reference", "cpu", "triton", or "auto".

    Returns:
        Images, shape (N, K, H', W'), contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or the backend cannot serve this call.
        TypeError: If dtypes disagree.
    """
    arguments.check_images("packed", packed)
    packed, weight, bias = arguments.autocast(packed, weight, bias)  # type: ignore[assignment]
    arguments.check_weight("weight", weight, "bias", bias, packed.shape[1], 1, packed, "packed")
    arguments.check_plan(index, count, packed.shape[1], packed)
    geometry = arguments.geometry(packed, weight, stride, padding, dilation)
    served = cpu_or_reference(backend, LAUNCHERS, packed, weight, *geometry)
    return torch.ops.gatedkernels.conv_in.default(
        packed, weight, bias, index, count, *geometry, dense_input_grad, served
    )
