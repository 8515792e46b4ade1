"""Compute only the units of a linear layer whose gates are open: schema, checks, launchers, gradients."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._autograd import differentiate_once
from gatedkernels.ops._backends import ALWAYS, Backend, refuse, require, too_dense
from gatedkernels.ops._select import select, select_
from gatedkernels.ops.gated_linear.reference import (
    along,
    gated_linear_backward_reference,
    gated_linear_reference,
    masked,
)


def _launch_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None
) -> Tensor:
    """What the reference does, in the fastest way that PyTorch has for it."""
    y = linear(x if in_mask is None or _is_open(in_mask) else select(x, along(in_mask, x)), weight, bias)
    return y if out_mask is None or _is_open(out_mask) else select_(y, along(out_mask, y))


def _is_open(mask: Tensor) -> bool:
    """Whether a mask closes nothing, where looking is free and nobody traces."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def _by_mask(x: Tensor, *masks: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """``x`` as (masks, tokens of one mask, C), and masks (masks, ·): a mask for every token as soon as one has that."""
    if all(mask is None or mask.ndim < x.ndim for mask in masks):
        return x.flatten(1, -2) if x.ndim > 2 else x[:, None], list(masks)
    rows = [None if mask is None else along(mask, x).expand(*x.shape[:-1], mask.shape[-1]) for mask in masks]
    return x.flatten(0, -2)[:, None], [None if mask is None else mask.flatten(0, -2) for mask in rows]


def _launch_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None
) -> Tensor:
    refuse("cpu", policy.linear_problem(x))
    rows, masks = _by_mask(x, in_mask, out_mask)
    y = torch.ops.gatedkernels.gated_linear_cpu(rows, weight, bias, *masks)
    return y.view(*x.shape[:-1], weight.shape[0])


def _launch_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_mask: Tensor | None, out_mask: Tensor | None
) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    rows, masks = _by_mask(x, in_mask, out_mask)
    return gated.gated_linear(rows, weight, bias, *masks).view(*x.shape[:-1], weight.shape[0])


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": gated_linear_reference,
    "dense": _launch_dense,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    dense_input_grad: bool,
    backend: str,
    threshold: float,
) -> Tensor:
    if backend == "triton" and threshold < 1 and in_mask is None and out_mask is not None:  # the device compares it
        from gatedkernels.ops.ragged import switch

        rows, (outs,) = _by_mask(x, out_mask)
        assert outs is not None
        return switch.gated_linear(rows, weight, bias, outs, threshold).reshape(*x.shape[:-1], -1).contiguous()
    launcher = LAUNCHERS["dense" if too_dense(threshold, in_mask, out_mask) else backend]
    return launcher(x, weight, bias, in_mask, out_mask).contiguous()


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
    """The weights' gradient, sample by sample from the open channels of that sample."""
    dweight = torch.zeros_like(weight)
    for n in range(x.shape[0]):
        ins = None if in_mask is None else in_mask[n].nonzero()[:, 0]
        outs = None if out_mask is None else out_mask[n].nonzero()[:, 0]
        x_n = x[n] if ins is None else x[n].index_select(1, ins)
        dy_n = dy[n] if outs is None else dy[n].index_select(1, outs)
        product = dy_n.T @ x_n
        if outs is None and ins is None:
            dweight += product
        elif outs is None:
            dweight.index_add_(1, cast(Tensor, ins), product)
        elif ins is None:
            dweight.index_add_(0, outs, product)
        else:
            dweight.index_put_((outs[:, None], ins), product, accumulate=True)
    return dweight


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The reference's gradients, with the work of closed channels left out."""
    dx = dweight = dbias = None
    if output_mask[0]:
        # The gradient of x is a gated linear layer itself: its inputs are gated by out_mask, its outputs by in_mask.
        dx = _launch_cpu(dy, weight.T, None, out_mask, None if dense_input_grad else in_mask)
    if output_mask[1]:
        rows, (ins, outs) = _by_mask(x, in_mask, out_mask)
        if rows.shape[1] <= policy.LINEAR_FEW:
            _, dweight, _ = gated_linear_backward_reference(
                dy, x, weight, in_mask, out_mask, dense_input_grad, (False, True, False)
            )
        else:
            dweight = _weight_gradient(_by_mask(dy, in_mask, out_mask)[0], rows, weight, ins, outs)
    if output_mask[2]:
        dbias = masked(dy, out_mask).flatten(0, -2).sum(0)
    return dx, dweight, dbias


def _backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None,
    out_mask: Tensor | None,
    dense_input_grad: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from gatedkernels.ops.ragged import gated

    rows, (ins, outs) = _by_mask(x, in_mask, out_mask)
    dy_rows, _ = _by_mask(dy, in_mask, out_mask)
    dx, dweight, dbias = gated.gated_linear_backward(dy_rows, rows, weight, ins, outs, dense_input_grad, output_mask)
    return None if dx is None else dx.view(x.shape), dweight, dbias


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
    dense_input_grad: bool,
    output_mask: Sequence[bool],
    backend: str,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if threshold != ALWAYS:
        threshold = min(threshold, policy.LINEAR_BACKWARD)
    dense = too_dense(threshold, in_mask, out_mask)
    launcher = BACKWARDS.get("dense" if dense else backend, gated_linear_backward_reference)
    gradients = launcher(dy, x, weight, in_mask, out_mask, dense_input_grad, output_mask)
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)
    return dx, dweight, dbias


torch.library.impl("gatedkernels::gated_linear", ("CPU", "CUDA"), _forward)
torch.library.impl("gatedkernels::gated_linear_backward", ("CPU", "CUDA"), _backward_launch)


@torch.library.register_fake("gatedkernels::gated_linear")
def _(x, weight, bias, in_mask, out_mask, dense_input_grad, backend, threshold):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gatedkernels::gated_linear_backward")
def _(dy, x, weight, in_mask, out_mask, dense_input_grad, output_mask, backend, threshold):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, output_mask, strict=True))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, in_mask, out_mask, *ctx.options = inputs
    ctx.save_for_backward(x, weight, in_mask, out_mask)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, in_mask, out_mask = ctx.saved_tensors
    dense_input_grad, backend, threshold = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.gatedkernels.gated_linear_backward.default(
        dy, x, weight, in_mask, out_mask, dense_input_grad, needs, backend, threshold
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 5


torch.library.register_autograd("gatedkernels::gated_linear", _backward, setup_context=_save)
differentiate_once("gated_linear_backward")


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
    *,
    group: int = 1,
    dense_input_grad: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Compute only the units of a linear layer whose gates are open.

    Equals ``linear(where(in_mask, x, 0), weight, bias)`` with zeros where ``out_mask`` is closed. Closed inputs are
    never read (a NaN there does not spread); products accumulate in float32 or wider. Each mask decides for a sample,
    all its tokens alike, or for every token: the first is fast, the second is right.

    Args:
        x: Samples, shape (N, …, C): any number of token dimensions, none included; float32, bfloat16, float16 or
            float64; any strides.
        weight: Shape (K, C), dtype of ``x`` (under autocast both are cast).
        bias: Shape (K,).
        in_mask: Open inputs, bool, shape (N, C / group) or (N, …, C / group); None: all.
        out_mask: Open outputs, bool, shape (N, K / group) or (N, …, K / group); None: all.
        group: Granularity of the masks: one decision for ``group`` neighbouring channels.
        dense_input_grad: The gradient of ``x`` is that of the unmasked layer, for every channel: what a
            straight-through gate estimator needs, and autograd of ``x * gate`` supplies.
        backend: "reference", "dense", "cpu", "triton", or "auto": the policy's choice. An explicit one never falls
            back.

    Returns:
        Shape (N, …, K), contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or the backend cannot serve this call.
        TypeError: If dtypes disagree, or a mask is not bool.

    Example:
        >>> mask = torch.tensor([[True, False, True]])
        >>> gated_linear(torch.ones(1, 2, 4), torch.ones(3, 4), out_mask=mask)
        tensor([[[4., 0., 4.],
                 [4., 0., 4.]]])
    """
    arguments.check_tokens("x", x)
    x, weight, bias = arguments.autocast(x, weight, bias)  # type: ignore[assignment]
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (K, C), got {tuple(weight.shape)}")
    arguments.check_like("weight", weight, (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        arguments.check_like("bias", bias, weight.shape[:1], x)
    in_mask = arguments.expand_token_mask("in_mask", in_mask, x.shape[-1], group, x)
    out_mask = arguments.expand_token_mask("out_mask", out_mask, weight.shape[0], group, x)
    if backend == "auto" and in_mask is None and out_mask is None:
        served, threshold = "dense", ALWAYS
    elif backend == "auto" and x.device.type == "cuda":
        recorded = arguments.recorded(x, weight, bias)
        served, threshold = policy.choose_linear_gpu(x, weight, in_mask, out_mask, recorded)
        if recorded and dense_input_grad:  # measured without
            served, threshold = "dense", ALWAYS
    elif backend == "auto":
        served, threshold = policy.choose_linear(x, weight, in_mask, out_mask)
    else:
        require(backend, LAUNCHERS, x)
        served, threshold = backend, ALWAYS
    return torch.ops.gatedkernels.gated_linear.default(
        x, weight, bias, in_mask, out_mask, dense_input_grad, served, threshold
    )
