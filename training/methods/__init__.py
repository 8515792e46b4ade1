"""Training methods; each receives the backbone that it trains."""

from gatedkernels.training.methods.us3l import US3L, US3LOptions
from gatedkernels.training.methods.vicreg_dual import VICRegDual

__all__ = ["US3L", "US3LOptions", "VICRegDual"]
