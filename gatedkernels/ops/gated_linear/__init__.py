"""The operation ``gated_linear``."""

from gatedkernels.ops.gated_linear.op import gated_linear as gated_linear
