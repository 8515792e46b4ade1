"""Gates, gated layers and blocks, and what they cost."""

from gatedkernels.nn.blocks import Branch, GatedBasicBlock, GatedBottleneck, check_branch
from gatedkernels.nn.codebook import CodebookGate, Codes
from gatedkernels.nn.costs import ConvCost
from gatedkernels.nn.fix_gates import fix_gates
from gatedkernels.nn.flops import FlopCount, LayerFlops, count_flops, gated_flops, kept_fraction
from gatedkernels.nn.fold import fold_norm
from gatedkernels.nn.gate import ChannelGate, Gate, gate_key
from gatedkernels.nn.gated_conv import GatedConv2d
from gatedkernels.nn.gated_linear import GatedLinear
from gatedkernels.nn.losses import bound_loss, sparsity_loss
from gatedkernels.nn.packed_blocks import run_blocks
from gatedkernels.nn.slimmable import Slimmable, SlimmableConv2d, SlimmableLinear, make_divisible
from gatedkernels.nn.slimmable_blocks import SlimmableBasicBlock, SlimmableBottleneck
from gatedkernels.nn.slimmable_norm import SlimmableBatchNorm2d, SlimmableLayerNorm, SwitchableBatchNorm2d
from gatedkernels.nn.straight_through import straight_through
from gatedkernels.nn.widths import SlimmableNetwork, calibrate_norms, is_slimmable, set_width, slice, width

__all__ = [
    "Branch",
    "ChannelGate",
    "CodebookGate",
    "Codes",
    "ConvCost",
    "FlopCount",
    "Gate",
    "GatedBasicBlock",
    "GatedBottleneck",
    "GatedConv2d",
    "GatedLinear",
    "LayerFlops",
    "Slimmable",
    "SlimmableBasicBlock",
    "SlimmableBatchNorm2d",
    "SlimmableBottleneck",
    "SlimmableConv2d",
    "SlimmableLayerNorm",
    "SlimmableLinear",
    "SlimmableNetwork",
    "SwitchableBatchNorm2d",
    "bound_loss",
    "calibrate_norms",
    "check_branch",
    "count_flops",
    "fix_gates",
    "fold_norm",
    "gate_key",
    "gated_flops",
    "is_slimmable",
    "kept_fraction",
    "make_divisible",
    "run_blocks",
    "set_width",
    "slice",
    "sparsity_loss",
    "straight_through",
    "width",
]
