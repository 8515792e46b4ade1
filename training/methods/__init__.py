"""Training methods; each receives the backbone that it trains."""

from gatedkernels.training.methods.us3l import US3L
from gatedkernels.training.methods.us_net import USNet
from gatedkernels.training.methods.vicreg_dual import VICRegDual

__all__ = ["US3L", "USNet", "VICRegDual"]
