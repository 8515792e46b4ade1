"""The operation ``sliced_linear``."""

from gatedkernels.ops.sliced_linear.op import sliced_linear as sliced_linear
