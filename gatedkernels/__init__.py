"""Kernels, networks and trainers that turn the FLOP savings of dynamic networks into measured milliseconds."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "models").is_dir() and (_CHECKOUT / "csrc").is_dir():
    # In a checkout, models/ and training/ lie beside this folder; installed, they lie inside it.
    __path__.append(str(_CHECKOUT))

from gatedkernels.nn import (
    ChannelGate,
    Gate,
    GatedConv2d,
    GatedLinear,
    SlimmableConv2d,
    SlimmableLinear,
    calibrate_norms,
    count_flops,
    fix_gates,
    slice,
    width,
)
from gatedkernels.ops import (
    conv_in,
    conv_out,
    gated_block,
    gated_conv2d,
    gated_linear,
    plan,
    sliced_conv2d,
    sliced_linear,
)

if TYPE_CHECKING:
    from gatedkernels import models, nn
    from gatedkernels.calibration import calibrate
    from gatedkernels.inference import optimize
    from gatedkernels.models import gate
    from gatedkernels.reporting.report import report
    from gatedkernels.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "ChannelGate",
    "Gate",
    "GatedConv2d",
    "GatedLinear",
    "SlimmableConv2d",
    "SlimmableLinear",
    "calibrate",
    "calibrate_norms",
    "conv_in",
    "conv_out",
    "count_flops",
    "fix_gates",
    "gate",
    "gated_block",
    "gated_conv2d",
    "gated_linear",
    "models",
    "nn",
    "optimize",
    "plan",
    "report",
    "slice",
    "sliced_conv2d",
    "sliced_linear",
    "tune",
    "width",
]

# Loaded when first asked for: they build on the names above.
_LAZY = {
    "calibrate": "gatedkernels.calibration",
    "gate": "gatedkernels.models",
    "optimize": "gatedkernels.inference",
    "report": "gatedkernels.reporting",
    "tune": "gatedkernels.tuning",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in {"models", "training"}:
        return import_module(f"gatedkernels.{name}")
    raise AttributeError(f"module 'gatedkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
