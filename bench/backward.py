"""Backward passes under masks that are given: from a case to its trial."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.cases import BackwardCase
from bench.trials import Call, Trial
from gatedkernels import gated_block, gated_conv2d
from gatedkernels.nn.fix_gates import draw_masks
from gatedkernels.reporting.baselines import check_same

_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@contextmanager
def backward_trial(case: BackwardCase) -> Iterator[Trial]:
    """The backward of a functional call against that of plain PyTorch with a masked product, in either layout.

    Every gradient is computed: of images, filters, biases and the residual. Forward passes are not timed; what they
    keep for the backward is theirs to choose.
    """
    # The runner measures in inference mode, where nothing is kept for a backward.
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        leaves = _leaves(case)
        mask = next(iter(draw_masks(case.operation, case.density, 0, case.batch, case.channels)))
        scale = mask.float()[..., None, None]
        dy = torch.randn(case.batch, case.channels, case.size, case.size)
        want = _gradients(_dense(case, [leaf.double() for leaf in leaves], scale.double()), dy.double())
        gated, got = _call(_gated(case, _laid_out(leaves, torch.channels_last), mask), dy, torch.channels_last)
        ways: dict[str, Call] = {}
        for name, form in _FORMATS.items():
            ways[name], others = _call(_dense(case, _laid_out(leaves, form), scale), dy, form)
            _check(f"the dense backward, {name}", others, want)
        _check(f"the backward of {case.operation}", got, want)
    yield Trial(gated, ways, float(scale.mean()))


Graph = tuple[Tensor, list[Tensor]]  # a result, and the leaves it was computed from


def _leaves(case: BackwardCase) -> list[Tensor]:
    count = 1 if case.operation == "gated_conv2d" else 2
    images = [torch.randn(case.batch, case.channels, case.size, case.size) for _ in range(count)]
    filters = [torch.randn(case.channels, case.channels, 3, 3) / (3 * case.channels**0.5) for _ in range(count)]
    # Results far from zero: there a ReLU's gradient jumps, and rounding would decide which one is compared.
    biases = [torch.randn(case.channels).sign() * 8 for _ in range(count)]
    return [*images, *filters, *biases]


def _laid_out(leaves: Sequence[Tensor], form: torch.memory_format) -> list[Tensor]:
    """Leaves of their own; images in a layout, filters as modules have them."""
    images = len(leaves) // 3
    return [leaf.clone(memory_format=form if i < images else torch.contiguous_format) for i, leaf in enumerate(leaves)]


def _gated(case: BackwardCase, leaves: list[Tensor], mask: Tensor) -> Graph:
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if case.operation == "gated_conv2d":
        x, weight, bias = leaves
        return gated_conv2d(x, weight, bias, out_mask=mask, padding=1), leaves
    x, residual, weight1, weight2, bias1, bias2 = leaves
    return gated_block(x, weight1, bias1, weight2, bias2, mask, residual=residual), leaves


def _dense(case: BackwardCase, leaves: list[Tensor], scale: Tensor) -> Graph:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if case.operation == "gated_conv2d":
        x, weight, bias = leaves
        return conv2d(x, weight, bias, padding=1) * scale, leaves
    x, residual, weight1, weight2, bias1, bias2 = leaves
    hidden = conv2d(x, weight1, bias1, padding=1).relu() * scale
    return (conv2d(hidden, weight2, bias2, padding=1) + residual).relu(), leaves


def _gradients(graph: Graph, dy: Tensor) -> tuple[Tensor, ...]:
    y, leaves = graph
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _call(graph: Graph, dy: Tensor, form: torch.memory_format) -> tuple[Call, tuple[Tensor, ...]]:
    laid_out = dy.contiguous(memory_format=form)

    def call() -> Tensor:
        with torch.inference_mode(False):
            return _gradients(graph, laid_out)[0]

    return call, _gradients(graph, laid_out)


def _check(name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for gradient, exact in zip(got, want, strict=True):
        check_same(name, gradient, exact)
