"""Milliseconds of whole networks: gated, dense in the best way, and masked."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatedkernels.inference import optimize
from gatedkernels.nn import ConvCost, Gate, count_flops, fix_gates, gated_flops, kept_fraction
from gatedkernels.reporting.baselines import dense_baselines, masked_baseline, verify
from gatedkernels.reporting.timing import Timing, interleave, use_threads

Masks = Literal["trained", "set"]

# A gate's logit next to zero may fall either way by rounding; more than so much of the FLOPs never does.
_GATES_AGREE = 0.002


def latency_rows(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    width: float = 1.0,
    batch_sizes: Sequence[int] = (1, 16),
    image_size: int = 32,
    masks: Masks = "trained",
    kept: float | None = None,
    density: float | None = None,
    threads: int | None = None,
    seconds: float = 4.0,
    compiled: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time a gated network after `gatedkernels.optimize` against dense PyTorch, one row a batch size.

    Everything is checked to compute the same before anything is timed.

    Args:
        model: A gated network in evaluation mode; it stays as it is.
        example: Images to take the batches from, on the model's device; None: noise of ``image_size``.
        width: The network's width, for the row.
        batch_sizes: Images in a batch.
        image_size: Height and width of the noise.
        masks: "trained": the gates decide; "set": masks drawn at random, the gates' own cost included all the same.
        kept: Fraction of the FLOPs that set masks keep, as nearly as whole channels allow.
        density: Fraction of the channels that set masks open, instead of ``kept``.
        threads: Threads to compute with; None: PyTorch's setting.
        seconds: How long to measure each row.
        compiled: Whether the dense baselines include ``torch.compile``.
        seed: Decides the noise and the set masks.

    Returns:
        Rows with ``device``, ``dtype``, ``batch``, ``threads``, ``width``, ``masks``, ``kept`` (executed FLOPs over
        dense ones), ``dense_eager_ms`` (the better memory format), ``dense_best_ms`` (the fastest dense way of all),
        ``masked_ms``, ``gated_ms``, ``speedup`` (dense_best_ms / gated_ms) and ``efficiency`` (speedup × kept).

    Raises:
        ValueError: If the example holds fewer images than a batch, or not exactly one of ``kept`` and ``density`` is
            given with masks "set", or any with "trained".
        RuntimeError: If the networks do not compute the same.
    """
    if masks not in ("trained", "set"):
        raise ValueError(f"masks must be 'trained' or 'set', got {masks!r}")
    if (kept is not None) + (density is not None) != (masks == "set"):
        raise ValueError(f"kept or density, one of them, must be given with masks 'set' alone, got {masks!r}")
    if example is None:
        parameter = next(model.parameters())
        noise = torch.randn(max(batch_sizes), 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))
        example = noise.to(parameter.device, parameter.dtype)
    if len(example) < max(batch_sizes):
        raise ValueError(f"example must hold at least {max(batch_sizes)} images, got {len(example)}")
    if kept is not None:
        density = density_for(model, example, kept)
    with use_threads(threads) as used:
        fast = optimize(model, example[: max(batch_sizes)])
        rows = []
        for batch in batch_sizes:
            timed = _time_row(model, fast, example[:batch], density, seconds, compiled, seed)
            facts = {
                "device": example.device.type,
                "dtype": str(example.dtype).removeprefix("torch."),
                "batch": batch,
                "threads": used,
                "width": width,
                "masks": masks,
            }
            rows.append(facts | timed)
    return rows


def _time_row(
    model: nn.Module, fast: nn.Module, x: Tensor, density: float | None, seconds: float, compiled: bool, seed: int
) -> dict[str, float]:
    dense = dense_baselines(model, x, compiled=compiled)
    masked, run_masked = masked_baseline(model, x)
    calls = {"masked": run_masked, "gated": lambda: fast(x)}
    copies = {"the model": model, "the optimised model": fast}
    verify(masked, copies, dense, x, density=0.5 if density is None else density)
    with ExitStack() as stack:
        for network in (model, masked, fast) if density is not None else ():
            stack.enter_context(fix_gates(network, density or 0.0, seed))
        kept, kept_fast = count_flops(model, x).kept, count_flops(fast, x).kept
        if abs(kept - kept_fast) > _GATES_AGREE:
            raise RuntimeError(f"the optimised gates must decide as the model's do, got {kept_fast} for {kept} kept")
        samples = interleave({**dense.calls, **calls}, seconds=seconds, device=x.device)
    ms = {name: Timing.of(times).median * 1e3 for name, times in samples.items()}
    best = min(ms[name] for name in dense.calls)
    speedup = best / ms["gated"]
    return {
        "kept": kept,
        "dense_eager_ms": min(ms[name] for name in dense.eager),
        "dense_best_ms": best,
        "masked_ms": ms["masked"],
        "gated_ms": ms["gated"],
        "speedup": speedup,
        "efficiency": speedup * kept,
    }


def density_for(model: nn.Module, example: Tensor, kept: float) -> float:
    """Find the density, the same for every gate, at which a network keeps a fraction of its FLOPs.

    Args:
        model: A gated module.
        example: Images of the size to count for.
        kept: The fraction, executed over dense.

    Returns:
        The density; `gatedkernels.fix_gates` rounds it to whole channels.

    Raises:
        ValueError: If no density keeps so little or so much.
    """
    costs = gated_flops(model, example)
    reach = _kept_at(costs, 0.0), _kept_at(costs, 1.0)
    if not reach[0] <= kept <= reach[1]:
        raise ValueError(f"kept must lie in [{reach[0]:.4f}, {reach[1]:.4f}] for this network, got {kept}")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _kept_at(costs, middle) < kept else (low, middle)
    return high


def _kept_at(costs: Sequence[ConvCost], density: float) -> float:
    weight = torch.full((1, 1), density, dtype=torch.float64)
    keys = {key for cost in costs for key in (cost.in_gate, cost.out_gate) if key is not None}
    return kept_fraction(costs, {key: Gate(weight > 0, weight) for key in keys}).item()
