"""The operator behind `optimize` for residual blocks in a row: one leaves sums of its result for the gate of the next.

On CUDA devices the Triton kernels serve it (not yet measured on hardware), elsewhere its definition.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gatedkernels.ops.channel_gate.reference import channel_gate_reference
from gatedkernels.ops.packed import DEFINITIONS, holds_gate, images_like, refuse_gradients, spread

SLOT = 16  # pixels of a sum, as in ragged/kernels.py: a part of every tile
# No compiled library has a part in it, and so its schema is not among its own.
torch.library.define(
    "gatedkernels::packed_residual_summed",
    "(Tensor x, Tensor? sums, Tensor gate_weight1, Tensor gate_bias1, Tensor gate_weight2, Tensor gate_bias2,"
    " Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? shortcut_weight, Tensor? shortcut_bias,"
    " Tensor? mask, SymInt stride) -> (Tensor, Tensor, Tensor)",
)


def sums_of(y: Tensor) -> Tensor:
    """Sums of every 16 neighbouring pixels of images (N, K, H, W), row by row: (N, K, ⌈H·W / 16⌉, 1), float32."""
    flat = y.flatten(2).float()
    sums = pad(flat, (0, -flat.shape[2] % SLOT)).unflatten(2, (-1, SLOT)).sum(3)
    return _room(y).copy_(sums[..., None])


def _room(y: Tensor) -> Tensor:
    slots = (y.shape[2] * y.shape[3] + SLOT - 1) // SLOT
    return y.new_empty((y.shape[0], slots, 1, y.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


def _summed(
    x: Tensor,
    sums: Tensor | None,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    mask: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = gate_weight1, gate_bias1, gate_weight2, gate_bias2
    # A gate takes the mean of what it looks at: of sums of 16 pixels, brought to the number of pixels.
    looked_at = x if sums is None else sums * (sums.shape[2] / (x.shape[2] * x.shape[3]))
    decided = channel_gate_reference(looked_at, *layers)
    y = DEFINITIONS["packed_residual"](
        x, *layers, weight1, bias1, weight2, bias2, None, None, shortcut_weight, shortcut_bias,
        decided if mask is None else mask, stride,
    )  # fmt: skip
    return y, decided, sums_of(y)


def summed_on_gpu(
    x: Tensor,
    sums: Tensor | None,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    mask: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``packed_residual`` whose gate looks at ``sums`` of x, where there are any, and which leaves sums in its turn."""
    layers = gate_weight1, gate_bias1, gate_weight2, gate_bias2
    weights, shortcut = (weight1, bias1, weight2, bias2), (shortcut_weight, shortcut_bias)
    if not holds_gate(x, layers):
        return _summed(x, sums, *layers, *weights, *shortcut, mask, stride)
    from gatedkernels.ops.ragged import optimized  # importing the package imports no Triton

    given = None if mask is None else spread(mask, len(bias1))
    y, decided, left = optimized.packed_residual(x, layers, *weights, given, *shortcut, stride, sums, summed=True)
    assert left is not None
    return y, decided, left


torch.library.impl("gatedkernels::packed_residual_summed", "CPU", _summed)
torch.library.impl("gatedkernels::packed_residual_summed", "CUDA", summed_on_gpu)
torch.library.register_autograd("gatedkernels::packed_residual_summed", refuse_gradients)


@torch.library.register_fake("gatedkernels::packed_residual_summed")
def _(x, sums, *arguments):  # type: ignore[no-untyped-def]
    gate_bias2, bias2, stride = arguments[3], arguments[7], arguments[-1]
    y = images_like(x, bias2.shape[0], stride)
    return y, x.new_empty((x.shape[0], gate_bias2.shape[0]), dtype=torch.bool), _room(y)
