"""The gated block where gradients are wanted, on the CPU: it keeps the hidden activation, and has a sparse backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from gatedkernels import policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops._autograd import differentiate_once
from gatedkernels.ops._backends import ALWAYS, refuse, too_dense
from gatedkernels.ops._select import select_

# Floats that follow each plane of the hidden activation, at least, and of which a plane is a multiple: see
# csrc/cpu/gradients.h.
_LINE = 16
_ONES = [1, 1]


def _pitch(pixels: int) -> int:
    return (pixels + _LINE - 1) // _LINE * _LINE + _LINE


def _as_images(hidden: Tensor, like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """The memory of ``hidden`` as dense images in the layout of ``like``."""
    n, (height, width) = hidden.shape[0], size
    flat = hidden.view(-1)[: n * channels * height * width]
    if arguments.memory_format(like) == torch.channels_last:
        return flat.view(n, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(n, channels, height, width)


def _forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """The block, and its hidden activation as the backward of the same kernels wants it."""
    refuse("cpu", policy.cpu_problem(x, weight1, stride, (1, 1), (1, 1), 1))
    form = arguments.memory_format(x)
    if not dense:
        y, hidden = torch.ops.gatedkernels.gated_block_kept_cpu(
            x, weight1, bias1, weight2, bias2, mask, residual, stride[0]
        )
        return y.contiguous(memory_format=form), hidden
    x = arguments.in_best_layout(x, weight1, weight2)
    computed = conv2d(x, weight1, bias1, list(stride), 1)
    size = computed.shape[2:]
    hidden = x.new_empty((x.shape[0], weight1.shape[0], _pitch(size[0] * size[1])))
    images = _as_images(hidden, x, weight1.shape[0], size)
    torch.clamp_min(computed, 0, out=images)
    y = conv2d(select_(images, mask[:, :, None, None]), weight2, bias2, 1, 1)
    y = (y if residual is None else y.add_(residual)).relu_()
    return y.contiguous(memory_format=form), hidden


def _backward_dense(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    stride: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of all but the residual, from the one before the last ReLU."""
    x = arguments.in_best_layout(x, weight1, weight2)
    h = _as_images(hidden, x, weight1.shape[0], dy.shape[2:])
    input, filters1, filters2 = needs
    backward, ungrouped = torch.ops.aten.convolution_backward, (False, [0, 0], 1)
    below = input or filters1
    dh, dweight2, dbias2 = backward(
        dy, h, weight2, [weight2.shape[0]], _ONES, _ONES, _ONES, *ungrouped, [below, filters2, filters2]
    )
    dx = dweight1 = dbias1 = None
    if below:  # a closed channel is zero, as one that the ReLU closed
        dh = torch.ops.aten.threshold_backward(dh, h, 0)
        dx, dweight1, dbias1 = backward(
            dh, x, weight1, [weight1.shape[0]], list(stride), _ONES, _ONES, *ungrouped, [input, filters1, filters1]
        )
    return dx, dweight1, dbias1, dweight2, dbias2


def _gradients(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    output_mask: Sequence[bool],
    dense: bool,
) -> tuple[Tensor, ...]:
    input, filters1, filters2 = output_mask
    form = arguments.memory_format(x)
    gradients: tuple[Tensor | None, ...]
    if dense:
        last = torch.ops.aten.threshold_backward(dy, y, 0)
        gradients = *_backward_dense(last, x, hidden, weight1, weight2, stride, (input, filters1, filters2)), last
    else:
        gradients = torch.ops.gatedkernels.gated_block_backward_cpu(
            dy, y, x, hidden, weight1, weight2, mask, stride[0], input, filters1, filters2
        )
        if form == torch.channels_last and input and filters1 and filters2:
            return gradients  # type: ignore[return-value]  # all of them wanted, and laid out as they are
    dx, dweight1, dbias1, dweight2, dbias2, dresidual = gradients

    def given(gradient: Tensor | None, wanted: bool, form: torch.memory_format = torch.contiguous_format) -> Tensor:
        return gradient.contiguous(memory_format=form) if wanted and gradient is not None else x.new_empty(0)

    return (
        given(dx, input, form),
        given(dweight1, filters1),
        given(dbias1, filters1),
        given(dweight2, filters2),
        given(dbias2, filters2),
        given(dresidual, True, form),
    )


def _comparing(run: Callable[..., tuple[Tensor, ...]], mask_at: int) -> Callable[..., tuple[Tensor, ...]]:
    """One of the above with a threshold instead of the decision."""

    def compared(*given: Any) -> tuple[Tensor, ...]:
        *rest, threshold = given
        return run(*rest, too_dense(threshold, given[mask_at]))

    return compared


torch.library.impl("gatedkernels::gated_block_kept", "CPU", _comparing(_forward, mask_at=5))
torch.library.impl("gatedkernels::gated_block_backward", "CPU", _comparing(_gradients, mask_at=6))


@torch.library.register_fake("gatedkernels::gated_block_kept")
def _(x, weight1, bias1, weight2, bias2, mask, residual, stride, threshold):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
    y = x.new_empty((x.shape[0], weight2.shape[0], *size)).to(memory_format=arguments.memory_format(x))
    return y, x.new_empty((x.shape[0], weight1.shape[0], _pitch(size[0] * size[1])))


@torch.library.register_fake("gatedkernels::gated_block_backward")
def _(dy, y, x, hidden, weight1, weight2, mask, stride, output_mask, threshold):  # type: ignore[no-untyped-def]
    input, filters1, filters2 = output_mask
    form = arguments.memory_format(x)
    return (
        x.new_empty(x.shape).to(memory_format=form) if input else x.new_empty(0),
        *(x.new_empty(shape if filters1 else 0) for shape in (weight1.shape, weight1.shape[:1])),
        *(x.new_empty(shape if filters2 else 0) for shape in (weight2.shape, weight2.shape[:1])),
        x.new_empty(y.shape).to(memory_format=form),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight1, _, weight2, _, mask, _, *ctx.options = inputs
    y, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, weight2, mask, y, hidden)


def _differentiate(ctx, dy, run):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 9
    x, weight1, weight2, mask, y, hidden = ctx.saved_tensors
    stride, serving = ctx.options
    needs = ctx.needs_input_grad
    wanted = (needs[0], needs[1] or needs[2], needs[3] or needs[4])
    gradients = run(dy, y, x, hidden, weight1, weight2, mask, stride, wanted, serving)
    dx, dweight1, dbias1, dweight2, dbias2, dresidual = gradients
    all_gradients = (dx, dweight1, dbias1, dweight2, dbias2, None, dresidual)
    return *(g if need else None for g, need in zip(all_gradients, needs[:7], strict=True)), None, None


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    return _differentiate(ctx, dy, torch.ops.gatedkernels.gated_block_backward.default)


torch.library.register_autograd("gatedkernels::gated_block_kept", _backward, setup_context=_save)
differentiate_once("gated_block_backward")


class _Called(torch.autograd.Function):
    """The same without the way through the dispatcher, whose Python takes longer than a small block's backward."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _differentiate(ctx, dy, _gradients)
        # The gradients may be differentiated, which their operator refuses.
        operator = torch.ops.gatedkernels.gated_block_backward.default
        return _differentiate(ctx, dy, lambda *given: operator(*given[:-1], 0.0 if given[-1] else ALWAYS))


def gated_block_training(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    mask: Tensor,
    residual: Tensor | None,
    stride: tuple[int, int],
    threshold: float,
) -> Tensor:
    """The block, recorded for autograd; arguments are checked and those of ``gated_block_kept``."""
    tensors = x, weight1, bias1, weight2, bias2, mask, residual
    if torch.compiler.is_compiling() or not _are_plain(tensors):
        return torch.ops.gatedkernels.gated_block_kept.default(*tensors, stride, threshold)[0]
    return _Called.apply(*tensors, stride, too_dense(threshold, mask))[0]


def _are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody is to see an operator: no fake or other subclass of tensors, no transform of ``torch.func``."""
    plain = (Tensor, torch.nn.Parameter, type(None))
    return all(type(t) in plain for t in tensors) and not torch._C._are_functorch_transforms_active()
