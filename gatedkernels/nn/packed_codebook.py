"""Gates of a mask codebook for inference."""

import torch
from torch import Tensor

from gatedkernels.nn.codebook import CodebookGate
from gatedkernels.nn.gate import GateLogits
from gatedkernels.nn.packed import PackedGate, check_images
from gatedkernels.ops.plan.reference import plan_reference


class PackedCodebookGate(PackedGate):
    """A gate that picks masks from a table, with the lists of these; returns the mask alone."""

    table: Tensor
    index: Tensor
    count: Tensor

    def __init__(self, gate: CodebookGate) -> None:
        super().__init__(gate)
        table = gate.masks >= 0
        index, count = plan_reference(table.repeat_interleave(gate.group, 1))
        self._keep(table=table, index=index, count=count)

    @property
    def decisions(self) -> int:
        """How many channels, or groups of them, are decided about."""
        return self.table.shape[1]

    @property
    def codebook(self) -> int:
        """How many masks there are."""
        return len(self.table)

    def forward(self, x: Tensor) -> Tensor:
        """Mask, bool, shape (N, C / group), from the layer's input (N, C_in, H, W)."""
        check_images(x, self.shapes[0].in_channels, self.weight1, is_computed=True)
        codes = torch.ops.gatedkernels.code_gate(x, *self.layers())
        table, codes = (self.table, codes) if self.fixed is None else self.fixed(x.shape[0])
        return table[codes]


def packed_gate(gate: GateLogits) -> PackedGate:
    """The packed form of a block's gate."""
    return PackedCodebookGate(gate) if isinstance(gate, CodebookGate) else PackedGate(gate)
