"""The block where the backend "triton" has more to choose from: shared lists, and two sides for two densities.

No compiled library has a part in these operators, and so their schemas are not among its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatedkernels.ops import _arguments as arguments

_ARGUMENTS = (
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor mask, Tensor? residual,"
    " SymInt[2] stride"
)


def _shared(x: Tensor, *rest: Any) -> Tensor:
    """Groups of ``shared`` samples of similar masks, the last argument."""
    from gatedkernels.ops.ragged import gated  # importing the package imports no Triton

    run: Callable[..., Tensor] = gated.gated_block
    return run(x, *rest, similar=True).contiguous(memory_format=arguments.memory_format(x))


def _switched(x: Tensor, *rest: Any) -> Tensor:
    """Gated up to a density, the last argument, and dense above it."""
    from gatedkernels.ops.ragged import switch

    return switch.gated_block(x, *rest).contiguous(memory_format=arguments.memory_format(x))


def _fake(x, weight1, bias1, weight2, bias2, mask, residual, stride, _):  # type: ignore[no-untyped-def]
    size = arguments.output_size(x, weight1, stride, (1, 1), (1, 1))
    return x.new_empty((x.shape[0], weight2.shape[0], *size)).to(memory_format=arguments.memory_format(x))


for _name, _option, _launch in (("shared", "int shared", _shared), ("switched", "float threshold", _switched)):
    torch.library.define(f"gatedkernels::{_name}_block", f"({_ARGUMENTS}, {_option}) -> Tensor")
    torch.library.impl(f"gatedkernels::{_name}_block", ("CPU", "CUDA"), _launch)
    torch.library.register_fake(f"gatedkernels::{_name}_block", _fake)
