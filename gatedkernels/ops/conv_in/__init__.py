"""The operation ``conv_in``."""

from gatedkernels.ops.conv_in.op import conv_in as conv_in
