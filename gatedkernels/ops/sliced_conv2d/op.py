"""Convolve the first channels with the first filters: schema, checks, launchers, gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._autograd import differentiate_once
from gatedkernels.ops._backends import Backend, refuse, require
from gatedkernels.ops._known import KnownCalls
from gatedkernels.ops._widths import Width, check_width, equal_widths, put, take
from gatedkernels.ops.sliced_conv2d.reference import sliced_conv2d_backward_reference, sliced_conv2d_reference

Sliced = tuple[Tensor, Tensor, Tensor | None, int]


_run_cpu = torch.ops.gatedkernels.sliced_conv2d_cpu.default
_KNOWN = KnownCalls(_run_cpu)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _slice(x: Tensor, weight: Tensor, bias: Tensor | None, outs: int, groups: int) -> Sliced:
    """What computes the first ``outs`` outputs, and maybe some more, from x (N, ins, H, W): as few groups as do."""
    ins = x.shape[1]
    if groups == 1:
        return x, weight[:outs, :ins], None if bias is None else bias[:outs], 1
    group_ins, group_outs = weight.shape[1], weight.shape[0] // groups
    groups = max(_ceil_div(ins, group_ins), _ceil_div(outs, group_outs))
    if groups * group_ins != ins:  # a group whose inputs are there in part
        x = pad(x, (0, 0, 0, 0, 0, groups * group_ins - ins))
    computed = groups * group_outs
    return x, weight[:computed], None if bias is None else bias[:computed], groups


def _launch_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Samples of equal widths together, through PyTorch's dense convolution; on a GPU all together, and masked."""
    if x.device.type != "cpu":
        return sliced_conv2d_reference(x, weight, bias, in_width, out_width, stride, padding, dilation, groups)
    shape = (x.shape[0], weight.shape[0], *arguments.output_size(x, weight, stride, padding, dilation))
    y = torch.empty(shape, dtype=x.dtype, memory_format=arguments.memory_format(x)).zero_()
    for samples, ins, outs in equal_widths(in_width, out_width, x.shape[0], (x.shape[1], weight.shape[0])):
        if outs and ins:
            part, filters, shift, some = _slice(take(x, samples, 1, ins), weight, bias, outs, groups)
            part = conv2d(part, filters, shift, list(stride), list(padding), list(dilation), some)[:, :outs]
            put(y, samples, 1, part)
        elif outs and bias is not None:
            put(y, samples, 1, bias[:outs, None, None].expand(1, outs, *shape[2:]))
    return y


def _launch_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    refuse("cpu", policy.cpu_problem(x, weight, stride, padding, dilation, groups))
    return _run_cpu(x, weight, bias, in_width, out_width, stride[0])


def _launch_triton(*args: Any) -> Tensor:
    from gatedkernels.ops.ragged.sliced import sliced_conv2d

    return sliced_conv2d(*args)


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": sliced_conv2d_reference,
    "dense": _launch_dense,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


def _forward(x: Tensor, *rest: Any) -> Tensor:
    *arguments_and_geometry, backend = rest
    return LAUNCHERS[backend](x, *arguments_and_geometry).contiguous(memory_format=arguments.memory_format(x))


def _backward_grouped(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, for samples of equal widths together and from no more channels than they have."""
    wide = torch.promote_types(x.dtype, torch.float32)  # what is added up over the groups is rounded once
    dx = torch.zeros_like(x) if output_mask[0] else None
    dweight = torch.zeros_like(weight, dtype=wide) if output_mask[1] else None
    dbias = torch.zeros(weight.shape[0], dtype=wide) if output_mask[2] else None
    for samples, ins, outs in equal_widths(in_width, out_width, x.shape[0], (x.shape[1], weight.shape[0])):
        if outs == 0:
            continue
        part_dy = take(dy, samples, 1, outs)
        if dbias is not None:
            dbias[:outs] += part_dy.sum((0, 2, 3), dtype=wide)
        if ins == 0 or (dx is None and dweight is None):
            continue
        part, filters, _, some = _slice(take(x, samples, 1, ins), weight, None, outs, groups)
        if filters.shape[0] != outs:  # the other outputs of the last group
            part_dy = pad(part_dy, (0, 0, 0, 0, 0, filters.shape[0] - outs))
        part_dx, part_dweight, _ = torch.ops.aten.convolution_backward(
            part_dy, part, filters, None, list(stride), list(padding), list(dilation), False, [0, 0], some,
            [*output_mask[:2], False],
        )  # fmt: skip
        if dx is not None:
            put(dx, samples, 1, part_dx[:, :ins])
        if dweight is not None:
            dweight[: filters.shape[0], : filters.shape[1]] += part_dweight
    return dx, None if dweight is None else dweight.to(x.dtype), None if dbias is None else dbias.to(x.dtype)


def _backward_cpu(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same with the kernel for dx: at stride 1 it is a sliced convolution itself, of dy, the widths swapped."""
    geometry, dx = (stride, padding, dilation, groups), None
    mirrored = weight.flip(2, 3).transpose(0, 1)
    if tuple(stride) == (1, 1) and not policy.cpu_problem(dy, mirrored, *geometry) and output_mask[0]:
        dx = _launch_cpu(dy, mirrored, None, out_width, in_width, *geometry)
        output_mask = (False, *output_mask[1:])
    rest = _backward_grouped(dy, x, weight, in_width, out_width, *geometry, output_mask)
    return (rest[0] if dx is None else dx), *rest[1:]


def _backward_triton(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from gatedkernels.ops.ragged.sliced import sliced_conv2d_backward

    return sliced_conv2d_backward(*args)


def _backward_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launcher: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]] = sliced_conv2d_backward_reference
    if backend == "triton":
        launcher = _backward_triton
    elif backend != "reference" and x.device.type == "cpu":
        launcher = _backward_cpu if backend == "cpu" else _backward_grouped
    dx, dweight, dbias = launcher(dy, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask)
    return (
        x.new_empty(0) if dx is None else dx.contiguous(memory_format=arguments.memory_format(x)),
        x.new_empty(0) if dweight is None else dweight.contiguous(),
        x.new_empty(0) if dbias is None else dbias,
    )


torch.library.impl("gatedkernels::sliced_conv2d", ("CPU", "CUDA"), _forward)
torch.library.impl("gatedkernels::sliced_conv2d_backward", ("CPU", "CUDA"), _backward_launch)


@torch.library.register_fake("gatedkernels::sliced_conv2d")
def _(x, weight, bias, in_width, out_width, stride, padding, dilation, groups, backend):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight, stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size)).to(memory_format=arguments.memory_format(x))


@torch.library.register_fake("gatedkernels::sliced_conv2d_backward")
def _(dy, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask, backend):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape).to(memory_format=arguments.memory_format(x)) if output_mask[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if output_mask[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if output_mask[2] else x.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, in_width, out_width, *ctx.options = inputs
    ctx.save_for_backward(x, weight, in_width, out_width)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    *geometry, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.gatedkernels.sliced_conv2d_backward.default(dy, *ctx.saved_tensors, *geometry, needs, backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 7


torch.library.register_autograd("gatedkernels::sliced_conv2d", _backward, setup_context=_save)
differentiate_once("sliced_conv2d_backward", "sliced operations with a width for every sample")


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_width: Width = None,
    out_width: Width = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve the first channels with the first filters: one set of weights, any width.

    With ints it equals ``conv2d(x[:, :i], weight[:o, :i], bias[:o])``. With a tensor every sample of the batch has its
    own width: ``gated_conv2d`` with masks that are prefixes, which need no list of channels. Channels beyond the width
    are never read (a NaN there does not spread). With groups, output k reads the inputs of its group as far as they
    are there: where the width ends between two groups, and so always in a depthwise convolution, this is the
    convolution of the first groups.

    Args:
        x: Images, shape (N, C', H, W), float32, bfloat16, float16 or float64, any strides; C' may be fewer than the C
            channels that the filters read, the first ones of them.
        weight: Filters, shape (K, C / groups, R, S), dtype of ``x`` (under autocast both are cast).
        bias: Shape (K,).
        in_width: Channels of ``x`` to read: an int from 1 to C', or int32 or int64, shape (N,), for every sample;
            None: all. Numbers in a tensor that are out of range mean the nearest that is not.
        out_width: Channels to compute: an int from 1 to K, or int32 or int64, shape (N,); None: all.
        stride: Pixels between windows, along H and W.
        padding: Zero pixels added on every side.
        dilation: Pixels between the taps of a window.
        groups: Groups of the convolution.
        backend: "reference", "dense", "cpu", "triton", or "auto": the policy's choice. An explicit one never falls
            back.

    Returns:
        Shape (N, out_width, H', W') with an int; with a tensor (N, K, H', W'), zeros beyond each sample's width. It is
        channels-last if ``x`` is channels-last and nothing else, else contiguous.

    Raises:
        ValueError: If shapes or devices disagree, a width is out of range, or the backend cannot serve this call.
        TypeError: If dtypes disagree, or a width is neither an int nor a tensor of ints.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019.

    Example:
        >>> x, weight = torch.ones(2, 4, 1, 1), torch.ones(3, 4, 1, 1)
        >>> sliced_conv2d(x, weight, in_width=2, out_width=1)[:, :, 0, 0]
        tensor([[2.],
                [2.]])
        >>> sliced_conv2d(x, weight, in_width=torch.tensor([1, 4]), out_width=torch.tensor([3, 2]))[:, :, 0, 0]
        tensor([[1., 1., 1.],
                [4., 4., 0.]])
    """
    given: tuple[Any, ...] = x, weight, bias, in_width, out_width
    options = stride, padding, dilation, groups, backend
    one_for_all = not isinstance(in_width, Tensor) and not isinstance(out_width, Tensor)
    if not one_for_all:
        arguments.refuse_tangents(x, weight, bias)
        known = _KNOWN.run(given, options)
        if known is not None:
            return known
    arguments.check_images("x", x)
    x, weight, bias = arguments.autocast(x, weight, bias)  # type: ignore[assignment]
    _check_filters(x, weight, bias, groups)
    geometry = arguments.geometry(x, weight, stride, padding, dilation)
    ins, in_widths = check_width("in_width", in_width, x.shape[1], x)
    outs, out_widths = check_width("out_width", out_width, weight.shape[0], x)
    if backend != "auto":
        require(backend, LAUNCHERS, x)
    form = arguments.memory_format(x)
    x, weight, bias, groups = _slice(x[:, :ins], weight, bias, outs, groups)
    if one_for_all and backend in ("auto", "dense"):
        y = conv2d(x, weight, bias, *geometry, groups)
    else:
        arguments.refuse_tangents(x, weight, bias)
        served = policy.choose_sliced(x, weight, *geometry, groups) if backend == "auto" else backend
        all_of_it = x, weight, bias, in_widths, out_widths, *geometry, groups
        if served == "cpu" and not torch.compiler.is_compiling() and not arguments.recorded(x, weight, bias):
            y = _launch_cpu(*all_of_it)  # without a dispatcher that calls Python back: 0.1 ms
            if all(each is None or isinstance(each, Tensor) for each in given) and given[1].shape == weight.shape:
                _KNOWN.note(given, options, geometry[0][0])
        else:
            y = torch.ops.gatedkernels.sliced_conv2d.default(*all_of_it, served)
    return y[:, :outs].contiguous(memory_format=form)


def _check_filters(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Filters that read at least the channels of ``x``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.ndim != 4:
        raise ValueError(f"weight must have shape (K, C / groups, R, S), got {tuple(weight.shape)}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    channels = weight.shape[1] * groups
    if x.shape[1] < 1 or x.shape[1] > channels:
        raise ValueError(f"x must have 1 to {channels} channels, which the filters read, got {tuple(x.shape)}")
    arguments.check_weight("weight", weight, "bias", bias, channels, groups, x)
