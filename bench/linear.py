"""Linear layers of multilayer perceptrons with gated hidden units: from a case to its trial."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import LinearCase
from bench.trials import Trial
from gatedkernels import gated_linear
from gatedkernels.nn.fix_gates import draw_masks
from gatedkernels.reporting.baselines import check_same

_HIDDEN = 4  # hidden units for each channel


@contextmanager
def linear_trial(case: LinearCase) -> Iterator[Trial]:
    """A functional call against the same result from plain PyTorch; checked in float64."""
    torch.manual_seed(0)
    hidden = _HIDDEN * case.channels
    inputs, outputs = (case.channels, hidden) if case.gated == "outputs" else (hidden, case.channels)
    x = torch.randn(case.batch, case.tokens, inputs)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    masks = list(draw_masks(f"linear {case.gated}", case.density, 0, case.batch, hidden))
    scales = [mask.float()[:, None] for mask in masks]
    packed = None
    if case.baseline == "prepacked":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, case.batch * case.tokens)

    def gated(mask: Tensor) -> Tensor:
        in_mask, out_mask = (None, mask) if case.gated == "outputs" else (mask, None)
        return gated_linear(x, weight, bias, in_mask, out_mask)

    def layer(x: Tensor) -> Tensor:
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return linear(x, weight, bias)

    def dense(scale: Tensor) -> Tensor:
        return layer(x).mul_(scale) if case.gated == "outputs" else layer(x * scale)

    with torch.inference_mode():
        mask = masks[0][:, None].double()
        before, after = (1.0, mask) if case.gated == "outputs" else (mask, 1.0)
        want = linear(x.double() * before, weight.double(), bias.double()) * after
        check_same("gated_linear", gated(masks[0]), want)
        check_same("the dense way", dense(scales[0]), want)
    drawn, scale = cycle(masks), cycle(scales)
    yield Trial(lambda: gated(next(drawn)), {case.baseline: lambda: dense(next(scale))}, float(mask.mean()))
