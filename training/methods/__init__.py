"""Training methods; each receives the backbone that it trains."""

from gatedkernels.training.methods.vicreg_dual import VICRegDual

__all__ = ["VICRegDual"]
