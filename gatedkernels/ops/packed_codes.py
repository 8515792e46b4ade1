"""The operators behind `optimize` for gates that pick masks from a codebook; layouts are those of `packed`.

On CUDA devices the Triton kernels serve them (not yet measured on hardware), elsewhere, and where there is no Triton,
the definitions below.
"""

import torch
from torch import Tensor

from gatedkernels.ops.channel_gate.reference import code_gate_reference
from gatedkernels.ops.packed import DEFINITIONS, holds_gate, images_like, refuse_gradients
from gatedkernels.ops.plan.reference import mask_of

# No compiled library has a part in them, and so their schemas are not among its own.
torch.library.define(
    "gatedkernels::code_gate", "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor"
)
torch.library.define(
    "gatedkernels::packed_coded_residual",
    "(Tensor x, Tensor gate_weight1, Tensor gate_bias1, Tensor gate_weight2, Tensor gate_bias2, Tensor weight1,"
    " Tensor bias1, Tensor weight2, Tensor bias2, Tensor index, Tensor count, Tensor? codes, Tensor? shortcut_weight,"
    " Tensor? shortcut_bias, SymInt stride) -> (Tensor, Tensor)",
)


def code_gate_on_gpu(x: Tensor, *layers: Tensor) -> Tensor:
    """The number of every sample's largest logit, int32 (N,), in one launch where the kernel holds the layers."""
    if not holds_gate(x, layers):
        return code_gate_reference(x, *layers)
    from gatedkernels.ops.channel_gate import launch  # importing the package imports no Triton

    return launch.code_gate(x, layers)[0]


def _coded_residual(
    x: Tensor,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor]:
    layers = gate_weight1, gate_bias1, gate_weight2, gate_bias2
    decided = code_gate_reference(x, *layers)
    mask = mask_of(index, count)[(decided if codes is None else codes).long()]
    y = DEFINITIONS["packed_residual"](
        x, *layers, weight1, bias1, weight2, bias2, None, None, shortcut_weight, shortcut_bias, mask, stride
    )
    return y, decided


def coded_residual_on_gpu(
    x: Tensor,
    gate_weight1: Tensor,
    gate_bias1: Tensor,
    gate_weight2: Tensor,
    gate_bias2: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """A residual block and its gate, which runs even where ``codes`` are given; the gate's codes come out as well.

    ``index`` (masks, M) and ``count`` (masks,) are the lists of the codebook.
    """
    layers = gate_weight1, gate_bias1, gate_weight2, gate_bias2
    weights, shortcut = (weight1, bias1, weight2, bias2), (shortcut_weight, shortcut_bias)
    if not holds_gate(x, layers):
        return _coded_residual(x, *layers, *weights, index, count, codes, *shortcut, stride)
    from gatedkernels.ops.ragged import optimized

    return optimized.packed_coded_residual(x, layers, *weights, optimized.List(index, count), codes, *shortcut, stride)


torch.library.impl("gatedkernels::code_gate", "CPU", code_gate_reference)
torch.library.impl("gatedkernels::code_gate", "CUDA", code_gate_on_gpu)
torch.library.impl("gatedkernels::packed_coded_residual", "CPU", _coded_residual)
torch.library.impl("gatedkernels::packed_coded_residual", "CUDA", coded_residual_on_gpu)
torch.library.register_autograd("gatedkernels::packed_coded_residual", refuse_gradients)


@torch.library.register_fake("gatedkernels::code_gate")
def _(x, *layers):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=torch.int32)


@torch.library.register_fake("gatedkernels::packed_coded_residual")
def _(x, *arguments):  # type: ignore[no-untyped-def]
    bias2, stride = arguments[7], arguments[-1]
    return images_like(x, bias2.shape[0], stride), x.new_empty(x.shape[0], dtype=torch.int32)
