"""The best that dense networks do, in every way we know, and dense with masks."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedkernels.nn import fix_gates
from gatedkernels.reporting.peers import PEERS
from gatedkernels.reporting.twins import build_twin, prepack

# More networks than this compiled in one process would fall back to eager without a word.
_COMPILED_NETWORKS = 256


@dataclass(frozen=True)
class Baselines:
    """Dense networks, ready to run on one batch.

    Attributes:
        calls: What computes the dense network, by name; all of them compute the same.
        eager: Names of those that need neither compiler nor packing.
        missing: Why a way is not among them, by name.
    """

    calls: dict[str, Callable[[], Tensor]]
    eager: tuple[str, ...]
    missing: dict[str, str]


def dense_baselines(model: nn.Module, example: Tensor, *, compiled: bool = True, peers: bool = False) -> Baselines:
    """Prepare the dense twin of a gated module in every way that may be the fastest.

    Normalisations are folded in all of them. "contiguous" and "channels-last" are eager; "prepacked" has oneDNN's
    packed filters and fused activations; "compiled" is ``torch.compile`` with freezing, for this batch size.
    "onnxruntime" and "openvino" are other engines, with threads of their own: those of the engine that ran before may
    still wait busily for a few milliseconds.

    Args:
        model: A gated module, as it is or optimised.
        example: The batch to run on.
        compiled: Whether to compile too, which takes seconds to a minute.
        peers: Whether to convert for other engines too, which takes seconds; without them installed, they are missing.

    Returns:
        The networks, bound to the batch.

    Raises:
        TypeError: If the model has no dense twin.
    """
    twin = build_twin(model)
    last = build_twin(model).to(memory_format=torch.channels_last)
    x, x_last = example.contiguous(), example.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {"contiguous": lambda: twin(x), "channels-last": lambda: last(x_last)}
    missing = {}
    try:
        packed = prepack(twin)
        calls["prepacked"] = lambda: packed(x_last)
    except RuntimeError as error:
        missing["prepacked"] = str(error)
    if compiled:
        try:
            fused = compile_frozen(last, x_last)
            calls["compiled"] = lambda: fused(x_last)
        except RuntimeError as error:
            missing["compiled"] = str(error)
            warnings.warn(f"the dense baselines lack torch.compile: {error}", stacklevel=2)
    for name, bind in PEERS.items() if peers else ():
        try:
            calls[name] = bind(twin, x)
        except RuntimeError as error:
            missing[name] = str(error)
    return Baselines(calls, ("contiguous", "channels-last"), missing)


def masked_baseline(model: nn.Module, example: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Prepare the network that computes everything and multiplies by the masks of its gates, channels-last.

    Args:
        model: A gated module, as it is or optimised.
        example: The batch to run on.

    Returns:
        The network, for `gatedkernels.fix_gates`, and the call that runs it on the batch.

    Raises:
        TypeError: If the model has no such twin.
    """
    twin = build_twin(model, gated=True).to(memory_format=torch.channels_last)
    x = example.contiguous(memory_format=torch.channels_last)
    return twin, lambda: twin(x)


def compile_frozen(module: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Compile a module with its weights as constants, for exactly this shape.

    Args:
        module: A module in evaluation mode.
        example: What it will be called with.

    Returns:
        The compiled function, for calls under ``torch.inference_mode()``.

    Raises:
        RuntimeError: If there is no working compiler; the message says why.
    """
    compiled = torch.compile(module, fullgraph=True, dynamic=False, options={"freezing": True})
    try:
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=_COMPILED_NETWORKS):
            compiled(example)
    except (RuntimeError, OSError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"torch.compile failed: {reason}") from error
    return compiled


def verify(
    reference: nn.Module, gated: Mapping[str, nn.Module], dense: Baselines, example: Tensor, *, density: float = 0.5
) -> None:
    """Refuse to measure what computes something else.

    Gated networks are compared under the same random masks, because a logit next to zero may fall either way by
    rounding; dense ones with all channels open.

    Args:
        reference: The masked twin, which is right by definition.
        gated: Gated networks with the gates of ``reference``, by name.
        dense: Dense baselines, bound to ``example``.
        example: The batch.
        density: Fraction of open channels in the masks.

    Raises:
        RuntimeError: If one of them computes something else.
    """
    with torch.inference_mode():
        right = _with_density(reference, example, density)
        for name, network in gated.items():
            check_same(name, _with_density(network, example, density), right)
        right = _with_density(reference, example, 1.0)
        for name, call in dense.calls.items():
            check_same(name, call(), right)


def check_same(name: str, got: Tensor, want: Tensor) -> None:
    """Refuse a result that differs from the right one by more than rounding.

    Args:
        name: What computed ``got``, for the message.
        got: The result.
        want: The right one.

    Raises:
        RuntimeError: If it does.
    """
    is_wide = all(tensor.dtype in (torch.float32, torch.float64) for tensor in (got, want))
    tolerance = 1e-4 if is_wide else 3e-2
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    if got.shape != want.shape or not error <= tolerance:
        raise RuntimeError(f"{name} must compute what it is compared with, got a relative error of {float(error):.2g}")


def _with_density(model: nn.Module, example: Tensor, density: float) -> Tensor:
    if not any(getattr(module, "is_gate", False) for module in model.modules()):
        return model(example)
    with fix_gates(model, density):
        return model(example)
