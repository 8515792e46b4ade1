"""The gated residual block in one operation: conv, ReLU, mask, conv, residual, ReLU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gatedkernels import policy
from gatedkernels._checks import check_int
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._arguments import in_best_layout
from gatedkernels.ops._backends import ALWAYS, Backend, refuse, require
from gatedkernels.ops._known import KnownCalls, unusual
from gatedkernels.ops._select import select_
from gatedkernels.ops.gated_block import device as _device  # noqa: F401  (registers its operators)
from gatedkernels.ops.gated_block.reference import gated_block_reference
from gatedkernels.ops.gated_block.training import gated_block_training

_run_cpu = torch.ops.gatedkernels.gated_block_cpu.default
_KNOWN = KnownCalls(_run_cpu)


def _launch_dense(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
) -> Tensor:
    """What the reference does, in the fastest way that PyTorch has for it."""
    x = in_best_layout(x, weight1, weight2)
    hidden = select_(conv2d(x, weight1, bias1, list(stride), 1).relu_(), mask[:, :, None, None])
    y = conv2d(hidden, weight2, bias2, 1, 1)
    return (y if residual is None else y.add_(residual)).relu_()


def _launch_cpu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    threshold: float = ALWAYS,
) -> Tensor:
    refuse("cpu", policy.cpu_problem(x, weight1, stride, (1, 1), (1, 1), 1))
    return _run_cpu(x, weight1, bias1, weight2, bias2, mask, residual, threshold, stride[0])


def _launch_triton(*args: Any) -> Tensor:
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    return gated.gated_block(*args)


LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "reference": gated_block_reference,
    "dense": _launch_dense,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
}


# The operator of every backend. `gated_block` hands the CPU's calls to operators that compare the density themselves.
def _forward(x: Tensor, *rest: Any) -> Tensor:
    *arguments_and_stride, backend = rest
    return LAUNCHERS[backend](x, *arguments_and_stride).contiguous(memory_format=arguments.memory_format(x))


torch.library.impl("gatedkernels::gated_block", ("CPU", "CUDA"), _forward)


@torch.library.register_fake("gatedkernels::gated_block")
def _fake(x, weight1, bias1, weight2, bias2, mask, residual, stride, *_):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
    return x.new_empty((x.shape[0], weight2.shape[0], *size)).to(memory_format=arguments.memory_format(x))


@torch.library.register_fake("gatedkernels::gated_block_cpu")
def _(x, weight1, bias1, weight2, bias2, mask, residual, threshold=ALWAYS, stride=1):  # type: ignore[no-untyped-def]
    return _fake(x, weight1, bias1, weight2, bias2, mask, residual, (stride, stride))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight1, bias1, weight2, _, mask, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2, mask, output)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight1, bias1, weight2, mask, y = ctx.saved_tensors
    stride, backend = ctx.options
    ops = torch.ops.gatedkernels
    ones, needs = (1, 1), ctx.needs_input_grad
    dy = torch.where(y > 0, dy, 0)
    # The hidden activation is computed again: it costs a third of what follows, and no memory between the passes.
    hidden = ops.gated_conv2d.default(
        x, weight1, bias1, None, mask, stride, ones, ones, 1, False, backend, ALWAYS
    ).relu()
    below = any(needs[:3])
    dhidden, dweight2, dbias2 = ops.gated_conv2d_backward.default(
        dy, hidden, weight2, mask, None, ones, ones, ones, 1, False, (below, needs[3], needs[4]), backend, ALWAYS
    )
    dx = dweight1 = dbias1 = None
    if below:
        dhidden = torch.where(hidden > 0, dhidden, 0)
        dx, dweight1, dbias1 = ops.gated_conv2d_backward.default(
            dhidden, x, weight1, None, mask, stride, ones, ones, 1, False, needs[:3], backend, ALWAYS
        )
    gradients = (dx, dweight1, dbias1, dweight2, dbias2, None, dy)
    return *(g if need else None for g, need in zip(gradients, needs[:7], strict=True)), None, None


torch.library.register_autograd("gatedkernels::gated_block", _backward, setup_context=_save)


def checked(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    stride: int | tuple[int, int],
) -> tuple[Any, ...]:
    """The tensors of a basic block as autocast has them, and the stride as a pair; errors of `gated_block`."""
    arguments.check_images("x", x)
    x, weight1, bias1, weight2, bias2, residual = arguments.autocast(  # type: ignore[assignment]
        x, weight1, bias1, weight2, bias2, residual
    )
    arguments.check_weight("weight1", weight1, "bias1", bias1, x.shape[1], 1, x)
    arguments.check_weight("weight2", weight2, "bias2", bias2, weight1.shape[0], 1, x)
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        if tuple(weight.shape[2:]) != (3, 3):
            raise ValueError(f"{name} must hold 3x3 filters, got {tuple(weight.shape)}")
    strides = arguments.pair("stride", stride, 1)
    arguments.check_fits(x, weight1, strides, (1, 1), (1, 1))
    if residual is not None:
        size = arguments.output_size(x, weight1, strides, (1, 1), (1, 1))
        arguments.check_like("residual", residual, (x.shape[0], weight2.shape[0], *size), x)
    return x, weight1, bias1, weight2, bias2, residual, strides


def gated_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    *,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    group: int = 1,
    shared: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Compute a gated basic block, batch normalisation folded into filters and biases.

    ``relu(conv2(where(mask, relu(conv1(x)), 0)) + residual)``: both convolutions 3x3 with padding 1, ``conv1`` with the
    stride; only the channels between them that the mask opens are computed and read.

    Args:
        x: Images, shape (N, C, H, W), floating, any strides.
        weight1: Filters, shape (M, C, 3, 3), dtype of ``x``.
        bias1: Shape (M,), or None.
        weight2: Filters, shape (K, M, 3, 3).
        bias2: Shape (K,), or None.
        mask: Open hidden channels of every sample, bool, shape (N, M / group).
        residual: Added before the last ReLU, shape (N, K, H', W'), or None.
        stride: Of the first convolution.
        group: Granularity of the mask.
        shared: So many samples, ordered by the similarity of their masks, share what is fetched and compute the union
            of what they open, which pays for small images whose masks are alike. A matter of time alone, and of
            backend "triton" without gradients; the others take no notice.
        backend: "reference", "dense", "cpu", "triton", or "auto": the policy's choice.

    Returns:
        Shape (N, K, H', W') with H' = (H - 1) // stride + 1, channels-last if ``x`` is channels-last and nothing else,
        else contiguous.

    Raises:
        ValueError: If shapes or devices disagree, ``shared`` is not positive, or the backend cannot serve this call.
        TypeError: If dtypes disagree, or the mask is not bool.
    """
    arguments.refuse_tangents(x, weight1, bias1, weight2, bias2, residual)
    if type(shared) is not int or shared < 1:
        check_int("shared", shared)
    given = x, weight1, bias1, weight2, bias2, mask, residual
    options = stride, group, backend
    y = _KNOWN.run(given, options)
    if y is not None:
        return y
    x, weight1, bias1, weight2, bias2, residual, strides = checked(x, weight1, bias1, weight2, bias2, residual, stride)
    if mask is None:
        raise TypeError("mask must be a tensor, got None")
    mask = arguments.expand_mask("mask", mask, weight1.shape[0], group, x)  # type: ignore[assignment]
    recorded = arguments.recorded(x, weight1, bias1, weight2, bias2, residual)
    if backend == "auto":
        kernel = "gated_block_training" if recorded and x.device.type == "cuda" else "gated_block"
        served, threshold = policy.choose(kernel, x, weight1, strides, (1, 1), (1, 1), 1)
    else:
        require(backend, LAUNCHERS, x)
        served, threshold = backend, ALWAYS
    # The device compares nothing in the backward.
    stuck = threshold < 1 and (recorded or not policy.can_switch(weight2.shape[0]))
    if served == "triton" and backend == "auto" and stuck:
        served = "dense"
    if served == "cpu" and recorded:
        if backend == "auto":
            threshold = policy.choose("gated_block_training", x, weight1, strides, (1, 1), (1, 1), 1).threshold
        return gated_block_training(x, weight1, bias1, weight2, bias2, mask, residual, strides, threshold)
    if served == "cpu":
        y = _launch_cpu(x, weight1, bias1, weight2, bias2, mask, residual, strides, threshold)
        if group == 1:
            _KNOWN.note(given, options, threshold, *unusual(strides[0]))
        return y
    whole = x, weight1, bias1, weight2, bias2, mask, residual, strides
    if served == "triton" and threshold < 1:
        return torch.ops.gatedkernels.switched_block.default(*whole, threshold)
    if served == "triton" and shared > 1 and not recorded:
        return torch.ops.gatedkernels.shared_block.default(*whole, shared)
    return torch.ops.gatedkernels.gated_block.default(*whole, served)
