"""Residual blocks from the weights of `optimize` as they lie, with their gates: the backend "triton"."""

from collections.abc import Sequence

from torch import Tensor

from gatedkernels import policy
from gatedkernels.ops.channel_gate.launch import channel_gate, code_gate
from gatedkernels.ops.ragged import switch
from gatedkernels.ops.ragged.configurations import together
from gatedkernels.ops.ragged.gated import Block
from gatedkernels.ops.ragged.groups import equal_groups
from gatedkernels.ops.ragged.launch import Groups, List, channels_dense, convolve, plan


def packed_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
) -> Tensor:
    """``gated_block`` from the weights of `optimize` as they lie: rows (M, 3, 3, C), blocks (⌈K / 32⌉, M, 3, 3, 32)."""
    return _run(_block(weight1, bias1, weight2, bias2), x, plan(mask), mask, residual, stride)[0]


def packed_residual(
    x: Tensor,
    layers: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    mask: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    sums: Tensor | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``packed_block`` with its gate and shortcut, and what the gate decided.

    Three launches, or four with a given mask, and one for a shortcut that convolves; three more where the device
    chooses between two sides.

    The gate looks at ``sums`` of the images' pixels, where the block before left them; ``summed``: leave such, too.
    """
    looked_at, area = (x, None) if sums is None else (sums, x.shape[2] * x.shape[3])
    decided, lists = channel_gate(looked_at, layers, len(bias1) // len(layers[3]), mask is None, area)
    lists, opened = (lists, decided) if mask is None else (plan(mask), mask)
    residual = _residual(x, shortcut_weight, shortcut_bias, stride, lists.arrived)
    y, left = _run(_block(weight1, bias1, weight2, bias2), x, lists, opened, residual, (stride, stride), summed)
    return y, decided, left


def packed_coded_residual(
    x: Tensor,
    layers: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lists: List,
    codes: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """``packed_residual`` of a codebook whose lists are there already, and the codes that the gate decided on.

    Three launches, or four where images are small and samples of one code share what is fetched.
    """
    decided, arrived = code_gate(x, layers)
    lists = lists._replace(arrived=arrived)
    residual = _residual(x, shortcut_weight, shortcut_bias, stride, arrived)
    block = _block(weight1, bias1, weight2, bias2)
    codes = decided if codes is None else codes
    shared = max(1, min(together(residual.shape[2] * residual.shape[3]), x.shape[0]))
    assert lists.counts is not None
    groups = Groups(None, codes) if shared == 1 else equal_groups(codes, len(lists.counts), shared)
    return block.run(x, lists, residual, (stride, stride), shared, groups)[0], decided


def _block(weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Block:
    """The weights of `optimize` as the kernels have them."""
    return Block(weight1.permute(0, 3, 1, 2), bias1, weight2, bias2, len(bias2))


def _run(
    block: Block,
    x: Tensor,
    lists: List,
    mask: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated side alone, or, with a measured threshold below 1, both of which the device chooses one.

    Where the gated side was measured to lose at every density it serves all the same: weights lie as it reads them.
    """
    served, threshold = policy.choose("gated_block", x, block.weight1, stride, (1, 1), (1, 1), 1)
    if served == "triton" and threshold < 1 and policy.can_switch(block.channels):
        return switch.run(block, x, lists, mask, residual, stride, threshold, summed)
    return block.run(x, lists, residual, stride, summed=summed)


def _residual(x: Tensor, weight: Tensor | None, bias: Tensor | None, stride: int, arrived: Tensor | None) -> Tensor:
    """What a block adds to its result: x, or the dense convolution of a shortcut from (⌈K / 32⌉, C, S, S, 32).

    ``arrived`` has counters for that, see `List`.
    """
    if weight is None or bias is None:
        return x
    size = [(length - 1) // stride + 1 for length in x.shape[2:]]
    y = x.new_empty((x.shape[0], *size, len(bias))).permute(0, 3, 1, 2)
    padding = (weight.shape[2] // 2,) * 2
    return convolve(
        channels_dense(x), weight, bias, y, outs=List(arrived=arrived), stride=(stride, stride), padding=padding,
        shared=max(1, x.shape[0]),
    )  # fmt: skip
