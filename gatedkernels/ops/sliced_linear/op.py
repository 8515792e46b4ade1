"""Compute the first units of a linear layer from its first inputs: schema, checks, launchers, gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._autograd import differentiate_once
from gatedkernels.ops._backends import Backend, refuse, require
from gatedkernels.ops._known import KnownCalls
from gatedkernels.ops._widths import Width, check_width, equal_widths, put, take
from gatedkernels.ops.sliced_linear.reference import sliced_linear_backward_reference, sliced_linear_reference


def _is_masked(x: Tensor) -> bool:
    """Whether all samples go together, masked: on a GPU, which must not wait for widths; one token is too few else."""
    return x.device.type != "cpu" or x.ndim == 2


def _launch_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    """Samples of equal widths together, through PyTorch's dense layer."""
    if _is_masked(x):
        return sliced_linear_reference(x, weight, bias, in_width, out_width)
    y = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    for samples, ins, outs in equal_widths(in_width, out_width, x.shape[0], (x.shape[-1], weight.shape[0])):
        if outs:
            part = linear(take(x, samples, -1, ins), weight[:outs, :ins], None if bias is None else bias[:outs])
            put(y, samples, -1, part)
    return y


def _run_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    y = torch.ops.gatedkernels.sliced_linear_cpu.default(_tokens(x), weight, bias, in_width, out_width)
    return y.view(*x.shape[:-1], weight.shape[0])


_KNOWN = KnownCalls(_run_cpu)


def _launch_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    refuse("cpu", policy.linear_problem(x))
    return _run_cpu(x, weight, bias, in_width, out_width)


def _launch_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_width: Tensor | None, out_width: Tensor | None
) -> Tensor:
    from gatedkernels.ops.ragged.sliced import sliced_linear

    return sliced_linear(_tokens(x), weight, bias, in_width, out_width).reshape(*x.shape[:-1], weight.shape[0])


def _tokens(x: Tensor) -> Tensor:
    """Every sample's tokens in one dimension, one token where there is none."""
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None]


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": sliced_linear_reference,
    "dense": _launch_dense,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


def _forward(*args: Any) -> Tensor:
    *tensors, backend = args
    return LAUNCHERS[backend](*tensors).contiguous()


def _backward_grouped(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, for samples of equal widths together and from no more channels than they have."""
    wide = torch.promote_types(x.dtype, torch.float32)  # what is added up over the groups is rounded once
    dx = torch.zeros_like(x) if output_mask[0] else None
    dweight = torch.zeros_like(weight, dtype=wide) if output_mask[1] else None
    dbias = torch.zeros(weight.shape[0], dtype=wide) if output_mask[2] else None
    for samples, ins, outs in equal_widths(in_width, out_width, x.shape[0], (x.shape[-1], weight.shape[0])):
        part_dy = take(dy, samples, -1, outs)
        if dx is not None:
            put(dx, samples, -1, part_dy @ weight[:outs, :ins])
        if dweight is not None:
            dweight[:outs, :ins] += part_dy.flatten(0, -2).T @ take(x, samples, -1, ins).flatten(0, -2)
        if dbias is not None:
            dbias[:outs] += part_dy.flatten(0, -2).sum(0, dtype=wide)
    return dx, None if dweight is None else dweight.to(x.dtype), None if dbias is None else dbias.to(x.dtype)


def _backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from gatedkernels.ops.ragged.sliced import sliced_linear_backward

    widths = in_width, out_width
    dx, dweight, dbias = sliced_linear_backward(_tokens(dy), _tokens(x), weight, *widths, output_mask)
    return None if dx is None else dx.reshape(x.shape), dweight, dbias


def _backward_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launcher: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]] = _backward_grouped
    if backend == "triton":
        launcher = _backward_triton
    elif backend == "reference" or _is_masked(x):
        launcher = sliced_linear_backward_reference
    gradients = launcher(dy, x, weight, in_width, out_width, output_mask)
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)
    return dx, dweight, dbias


torch.library.impl("gatedkernels::sliced_linear", ("CPU", "CUDA"), _forward)
torch.library.impl("gatedkernels::sliced_linear_backward", ("CPU", "CUDA"), _backward_launch)


@torch.library.register_fake("gatedkernels::sliced_linear")
def _(x, weight, bias, in_width, out_width, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gatedkernels::sliced_linear_backward")
def _(dy, x, weight, in_width, out_width, output_mask, backend):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, output_mask, strict=True))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, in_width, out_width, ctx.backend = inputs
    ctx.save_for_backward(x, weight, in_width, out_width)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.gatedkernels.sliced_linear_backward.default(dy, *ctx.saved_tensors, needs, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


torch.library.register_autograd("gatedkernels::sliced_linear", _backward, setup_context=_save)
differentiate_once("sliced_linear_backward", "sliced operations with a width for every sample")


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_width: Width = None,
    out_width: Width = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the first units of a linear layer from its first inputs: one set of weights, any width.

    With ints it equals ``linear(x[..., :i], weight[:o, :i], bias[:o])``. With a tensor every sample of the batch has
    its own width, for all its tokens: ``gated_linear`` with masks that are prefixes, which need no list of channels.
    Inputs beyond the width are never read (a NaN there does not spread).

    Args:
        x: Samples, shape (N, …, C'): any number of token dimensions, none included; float32, bfloat16, float16 or
            float64, any strides; C' may be fewer than the C inputs that the units read, the first ones of them.
        weight: Shape (K, C), dtype of ``x`` (under autocast both are cast).
        bias: Shape (K,).
        in_width: Channels of ``x`` to read: an int from 1 to C', or int32 or int64, shape (N,), for every sample;
            None: all. Numbers in a tensor that are out of range mean the nearest that is not.
        out_width: Units to compute: an int from 1 to K, or int32 or int64, shape (N,); None: all.
        backend: "reference", "dense", "cpu", "triton", or "auto": the policy's choice. An explicit one never falls
            back.

    Returns:
        Shape (N, …, out_width) with an int; with a tensor (N, …, K), zeros beyond each sample's width. Contiguous.

    Raises:
        ValueError: If shapes or devices disagree, a width is out of range, or the backend cannot serve this call.
        TypeError: If dtypes disagree, or a width is neither an int nor a tensor of ints.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019.

    Example:
        >>> x, weight = torch.ones(2, 4), torch.ones(3, 4)
        >>> sliced_linear(x, weight, in_width=torch.tensor([1, 4]), out_width=torch.tensor([3, 2]))
        tensor([[1., 1., 1.],
                [4., 4., 0.]])
    """
    given: tuple[Any, ...] = x, weight, bias, in_width, out_width
    if isinstance(in_width, Tensor) or isinstance(out_width, Tensor):
        arguments.refuse_tangents(x, weight, bias)
        known = _KNOWN.run(given, (backend,))
        if known is not None:
            return known
    arguments.check_tokens("x", x)
    x, weight, bias = arguments.autocast(x, weight, bias)  # type: ignore[assignment]
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (K, C), got {tuple(weight.shape)}")
    arguments.check_like("weight", weight, weight.shape, x)
    if bias is not None:
        arguments.check_like("bias", bias, weight.shape[:1], x)
    if x.shape[-1] < 1 or x.shape[-1] > weight.shape[1]:
        raise ValueError(f"x must have 1 to {weight.shape[1]} channels, which the units read, got {tuple(x.shape)}")
    ins, in_widths = check_width("in_width", in_width, x.shape[-1], x)
    outs, out_widths = check_width("out_width", out_width, weight.shape[0], x)
    if backend != "auto":
        require(backend, LAUNCHERS, x)
    x, weight, bias = x[..., :ins], weight[:outs, :ins], None if bias is None else bias[:outs]
    if in_widths is None and out_widths is None and backend in ("auto", "dense"):
        return linear(x, weight, bias).contiguous()
    arguments.refuse_tangents(x, weight, bias)
    served = policy.choose_sliced_linear(x) if backend == "auto" else backend
    if served == "cpu" and not torch.compiler.is_compiling() and not arguments.recorded(x, weight, bias):
        y = _launch_cpu(x, weight, bias, in_widths, out_widths)  # without a dispatcher that calls Python back
        if all(each is None or isinstance(each, Tensor) for each in given) and given[1].shape == weight.shape:
            _KNOWN.note(given, (backend,))
        return y.contiguous()
    return torch.ops.gatedkernels.sliced_linear.default(x, weight, bias, in_widths, out_widths, served)
