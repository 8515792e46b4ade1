"""The operation ``sliced_conv2d``."""

from gatedkernels.ops.sliced_conv2d.op import sliced_conv2d as sliced_conv2d
