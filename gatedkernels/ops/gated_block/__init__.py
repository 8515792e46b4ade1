"""The operation ``gated_block``."""

from gatedkernels.ops.gated_block.op import gated_block as gated_block
