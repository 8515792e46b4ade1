"""The operation ``plan``."""

from gatedkernels.ops.plan.op import plan as plan
