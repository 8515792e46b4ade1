"""The operation ``gated_conv2d``."""

from gatedkernels.ops.gated_conv2d.op import gated_conv2d as gated_conv2d
