"""The operations, one folder each."""

from gatedkernels.ops import packed as packed
from gatedkernels.ops import packed_codes as packed_codes
from gatedkernels.ops import packed_sums as packed_sums
from gatedkernels.ops.coded_block import coded_block as coded_block
from gatedkernels.ops.conv_in import conv_in as conv_in
from gatedkernels.ops.conv_out import conv_out as conv_out
from gatedkernels.ops.gated_block import gated_block as gated_block
from gatedkernels.ops.gated_conv2d import gated_conv2d as gated_conv2d
from gatedkernels.ops.gated_linear import gated_linear as gated_linear
from gatedkernels.ops.plan import plan as plan
from gatedkernels.ops.sliced_conv2d import sliced_conv2d as sliced_conv2d
from gatedkernels.ops.sliced_linear import sliced_linear as sliced_linear
