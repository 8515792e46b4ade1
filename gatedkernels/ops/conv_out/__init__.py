"""The operation ``conv_out``."""

from gatedkernels.ops.conv_out.op import conv_out as conv_out
