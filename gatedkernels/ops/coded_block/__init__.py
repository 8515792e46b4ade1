"""The gated block whose samples pick their masks from a table."""

from gatedkernels.ops.coded_block.op import coded_block as coded_block
