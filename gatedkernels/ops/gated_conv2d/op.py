"""Convolve only the channels whose gates are open: schema, checks, launchers, gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._autograd import differentiate_once
from gatedkernels.ops._backends import ALWAYS, Backend, refuse, require, too_dense
from gatedkernels.ops._known import KnownCalls, unusual
from gatedkernels.ops._select import select, select_
from gatedkernels.ops.gated_conv2d.reference import gated_conv2d_backward_reference, gated_conv2d_reference, masked

_run_cpu = torch.ops.gatedkernels.gated_conv2d_cpu.default
_KNOWN = KnownCalls(_run_cpu)


def _launch_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None, *geometry: Any
) -> Tensor:
    """What the reference does, in the fastest way that PyTorch has for it."""
    x = arguments.in_best_layout(x, weight)
    x = x if in_mask is None else select(x, in_mask[:, :, None, None])
    y = gated_conv2d_reference(x, weight, bias, None, None, *geometry)
    return y if out_mask is None else select_(y, out_mask[:, :, None, None])


def _launch_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threshold: float = ALWAYS,
) -> Tensor:
    refuse("cpu", policy.cpu_problem(x, weight, stride, padding, dilation, groups))
    return _run_cpu(x, weight, bias, in_mask, out_mask, threshold, stride[0])


def _launch_cuda(*args: object) -> Tensor:
    return torch.ops.gatedkernels.gated_conv2d_cuda(*args)


def _launch_triton(*args: Any) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    return gated.gated_conv2d(*args)


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": gated_conv2d_reference,
    "dense": _launch_dense,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
    "cuda": _launch_cuda,
}


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_input_grad: bool,
    backend: str,
    threshold: float,
) -> Tensor:
    launcher = LAUNCHERS[backend]
    if backend == "cpu":  # compares the density itself
        return launcher(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups, threshold)
    if backend == "triton" and threshold < 1 and in_mask is None:  # the device compares it
        from gatedkernels.ops.ragged import switch

        assert out_mask is not None  # without a mask nothing has a threshold
        y = switch.gated_conv2d(x, weight, bias, out_mask, stride, padding, dilation, threshold)
    else:
        y = launcher(x, weight, bias, in_mask, out_mask, stride, padding, dilation, groups)
    return y.contiguous(memory_format=arguments.memory_format(x))


def _input_gradient_is_sparse(
    weight: Tensor, out_mask: Tensor | None, stride: Sequence[int], dense_input_grad: bool
) -> bool:
    """Whether the gradient of x has a kernel that leaves work out."""
    if out_mask is not None:
        return stride[0] == 1 or weight.shape[2] == 3
    return stride[0] == 1 and not dense_input_grad


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The reference's gradients, with the work of closed channels left out where that is exact."""
    if in_mask is None and out_mask is None:
        return gated_conv2d_backward_reference(
            dy, x, weight, None, None, stride, padding, dilation, groups, dense_input_grad, output_mask
        )
    by_kernel = output_mask[0] and _input_gradient_is_sparse(weight, out_mask, stride, dense_input_grad)
    dx, dweight = torch.ops.gatedkernels.gated_conv2d_backward_cpu(
        dy, x, weight, in_mask, out_mask, stride[0], dense_input_grad, by_kernel, output_mask[1]
    )
    if output_mask[0] and not by_kernel:
        dx, _, _ = gated_conv2d_backward_reference(
            dy,
            x,
            weight,
            in_mask,
            out_mask,
            stride,
            padding,
            dilation,
            groups,
            dense_input_grad,
            (True, False, False),
        )
    dbias = masked(dy, out_mask).sum((0, 2, 3)) if output_mask[2] else None
    return dx if output_mask[0] else None, dweight if output_mask[1] else None, dbias


def _backward_triton(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from gatedkernels.ops.ragged import gated

    return gated.gated_conv2d_backward(*args)


# The backends with gradients of their own; the others take the reference's.
BACKWARDS: dict[str, Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]] = {
    "cpu": _backward_cpu,
    "triton": _backward_triton,
}


def _backward_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
    backend: str,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpu" and threshold != ALWAYS:  # the policy's, for the forward
        kernel = "conv_in_backward" if out_mask is None else "conv_out_backward"
        threshold = policy.choose(kernel, x, weight, stride, padding, dilation, groups).threshold
    # With both masks the kernels save by the output channels.
    dense = too_dense(threshold, in_mask if out_mask is None else out_mask)
    launcher = BACKWARDS.get("dense" if dense else backend, gated_conv2d_backward_reference)
    dx, dweight, dbias = launcher(
        dy, x, weight, in_mask, out_mask, stride, padding, dilation, groups, dense_input_grad, output_mask
    )
    return (
        x.new_empty(0) if dx is None else dx.contiguous(memory_format=arguments.memory_format(x)),
        x.new_empty(0) if dweight is None else dweight.contiguous(),
        x.new_empty(0) if dbias is None else dbias,
    )


torch.library.impl("gatedkernels::gated_conv2d", ("CPU", "CUDA"), _forward)
torch.library.impl("gatedkernels::gated_conv2d_backward", ("CPU", "CUDA"), _backward_launch)


@torch.library.register_fake("gatedkernels::gated_conv2d")
def _fake(x, weight, bias, in_mask, out_mask, stride, padding, dilation, *_):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size)).to(memory_format=arguments.memory_format(x))


@torch.library.register_fake("gatedkernels::gated_conv2d_cpu")
def _(x, weight, bias, in_mask, out_mask, threshold=ALWAYS, stride=1):  # type: ignore[no-untyped-def]
    padding = [side // 2 for side in weight.shape[2:]]
    return _fake(x, weight, bias, in_mask, out_mask, (stride, stride), padding, (1, 1))


@torch.library.register_fake("gatedkernels::gated_conv2d_backward")
def _(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    in_mask,
    out_mask,
    stride,
    padding,
    dilation,
    groups,
    dense_input_grad,
    output_mask,
    backend,
    threshold,
):
    return (
        x.new_empty(x.shape).to(memory_format=arguments.memory_format(x)) if output_mask[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if output_mask[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if output_mask[2] else x.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, in_mask, out_mask, *ctx.options = inputs
    ctx.save_for_backward(x, weight, in_mask, out_mask)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, in_mask, out_mask = ctx.saved_tensors
    stride, padding, dilation, groups, dense_input_grad, backend, threshold = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.gatedkernels.gated_conv2d_backward.default(
        dy, x, weight, in_mask, out_mask, stride, padding, dilation, groups, dense_input_grad, needs, backend, threshold
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 9


torch.library.register_autograd("gatedkernels::gated_conv2d", _backward, setup_context=_save)
differentiate_once("gated_conv2d_backward")


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    group: int = 1,
    dense_input_grad: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve only the channels whose gates are open.

    Equals ``conv2d(where(in_mask, x, 0), weight, bias)`` with zeros where ``out_mask`` is closed. Closed input channels
    are never read (a NaN there does not spread); products accumulate in float32 or wider.

    Args:
        x: Images, shape (N, C, H, W), float32, bfloat16, float16 or float64; any strides.
        weight: Filters, shape (K, C / groups, R, S), dtype of ``x`` (under autocast both are cast).
        bias: Shape (K,).
        in_mask: Open input channels of every sample, bool, shape (N, C / group); None: all.
        out_mask: Open output channels of every sample, bool, shape (N, K / group); None: all.
        stride: Pixels between windows, along H and W.
        padding: Zero pixels added on every side.
        dilation: Pixels between the taps of a window.
        groups: Groups of the convolution.
        group: Granularity of the masks: one decision for ``group`` neighbouring channels.
        dense_input_grad: The gradient of ``x`` is that of the unmasked convolution, for every channel: what a
            straight-through gate estimator needs, and autograd of ``x * gate`` supplies.
        backend: "reference", "dense", "cpu", "triton", "cuda", or "auto": the policy's choice. An explicit one never
            falls back.

    Returns:
        Shape (N, K, H', W') with H' = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, channels-last if ``x`` is
        channels-last and nothing else, else contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or the backend cannot serve this call.
        TypeError: If dtypes disagree, or a mask is not bool.
    """
    arguments.refuse_tangents(x, weight, bias)
    given = x, weight, bias, in_mask, out_mask
    options = stride, padding, dilation, groups, group, backend
    y = _KNOWN.run(given, options)
    if y is not None:
        return y
    arguments.check_images("x", x)
    x, weight, bias = arguments.autocast(x, weight, bias)  # type: ignore[assignment]
    arguments.check_weight("weight", weight, "bias", bias, x.shape[1], groups, x)
    geometry = arguments.geometry(x, weight, stride, padding, dilation)
    in_mask = arguments.expand_mask("in_mask", in_mask, x.shape[1], group, x)
    out_mask = arguments.expand_mask("out_mask", out_mask, weight.shape[0], group, x)
    recorded = arguments.recorded(x, weight, bias)
    if backend == "auto" and in_mask is None and out_mask is None:
        served, threshold = "dense", ALWAYS
    elif backend == "auto":
        kernel = "conv_in" if out_mask is None else "conv_out"
        if recorded and x.device.type == "cuda":
            kernel += "_training"
        served, threshold = policy.choose(kernel, x, weight, *geometry, groups)
    else:
        require(backend, LAUNCHERS, x)
        served, threshold = backend, ALWAYS
    both = in_mask is not None and out_mask is not None
    # Measured for one mask, with exact gradients; and the device compares nothing in the backward.
    unmeasured = both or (recorded and (threshold < 1 or dense_input_grad))
    if served == "triton" and backend == "auto" and unmeasured:
        served, threshold = "dense", ALWAYS
    if served == "cpu" and not recorded:
        y = _launch_cpu(x, weight, bias, in_mask, out_mask, *geometry, groups, threshold)
        if group == 1:
            _KNOWN.note(given, options, threshold, *unusual(geometry[0][0]))
        return y
    return torch.ops.gatedkernels.gated_conv2d.default(
        x, weight, bias, in_mask, out_mask, *geometry, groups, dense_input_grad, served, threshold
    )
