"""The out-gated convolution: only the active output channels, packed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._backends import Backend, cpu_or_reference, refuse
from gatedkernels.ops.conv_out.reference import conv_out_reference
from gatedkernels.ops.plan.reference import mask_of, unpack


def _launch_cpu(
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
    refuse("cpu", policy.cpu_problem(x, weight, stride, padding, dilation, 1))
    return torch.ops.gatedkernels.conv_out_cpu(x, weight, bias, index, count, stride[0], relu)


def _launch_triton(*args: Any) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    return gated.conv_out(*args)


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": conv_out_reference,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


def _forward(*args: Any) -> Tensor:
    *tensors_and_geometry, backend = args
    return LAUNCHERS[backend](*tensors_and_geometry).contiguous()


torch.library.impl("gatedkernels::conv_out", ("CPU", "CUDA"), _forward)


@torch.library.register_fake("gatedkernels::conv_out")
def _(x, weight, bias, index, count, stride, padding, dilation, relu, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0], *arguments.output_size(x, weight, stride, padding, dilation)))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, index, count, *ctx.options = inputs
    ctx.save_for_backward(x, weight, index, count, output)


def _backward(ctx, dpacked):  # type: ignore[no-untyped-def]
    x, weight, index, count, packed = ctx.saved_tensors
    stride, padding, dilation, relu, backend = ctx.options
    if relu:
        dpacked = torch.where(packed > 0, dpacked, 0)
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.gatedkernels.gated_conv2d_backward.default(
        unpack(dpacked, index, count),
        x,
        weight,
        None,
        mask_of(index, count),
        stride,
        padding,
        dilation,
        1,
        False,
        needs,
        backend,
        1.0,
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 7


torch.library.register_autograd("gatedkernels::conv_out", _backward, setup_context=_save)


def conv_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    relu: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute only the active output channels of every sample, packed.

    Args:
        x: Images, shape (N, C, H, W), floating, any strides.
        weight: Filters, shape (K, C, R, S), dtype of ``x``.
        bias: Shape (K,), or None.
        index: Int32, shape (N, K), from ``plan``: a permutation, the active channels first.
        count: Int32, shape (N,), from ``plan``.
        stride: Pixels between windows, along H and W.
        padding: Zero pixels added on every side.
        dilation: Pixels between the taps of a window.
        relu: Apply a ReLU.
        backend: "reference", "cpu", "triton", or "auto".

    Returns:
        Packed images, shape (N, K, H', W'), contiguous: channel j < count[n] of sample n is channel index[n, j] of the
        convolution; the channels from count[n] on are zero.

    Raises:
        ValueError: If shapes or devices disagree, or the backend cannot serve this call.
        TypeError: If dtypes disagree.
    """
    arguments.check_images("x", x)
    x, weight, bias = arguments.autocast(x, weight, bias)  # type: ignore[assignment]
    arguments.check_weight("weight", weight, "bias", bias, x.shape[1], 1, x)
    arguments.check_plan(index, count, weight.shape[0], x)
    geometry = arguments.geometry(x, weight, stride, padding, dilation)
    served = cpu_or_reference(backend, LAUNCHERS, x, weight, *geometry)
    return torch.ops.gatedkernels.conv_out.default(x, weight, bias, index, count, *geometry, relu, served)
