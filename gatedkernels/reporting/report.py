"""FLOPs and milliseconds of a gated network, layer by layer and in all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from gatedkernels._checks import check_module, check_number, check_type
from gatedkernels.inference import optimize
from gatedkernels.models import GatedResNet
from gatedkernels.nn import FlopCount, count_flops
from gatedkernels.nn.packed import Packed
from gatedkernels.reporting.baselines import dense_baselines, verify
from gatedkernels.reporting.layers import Stopwatch, time_layers
from gatedkernels.reporting.machine import bandwidth, peak_macs
from gatedkernels.reporting.tables import terminal_table
from gatedkernels.reporting.timing import Timing, interleave, use_threads
from gatedkernels.reporting.twins import build_twin, prepack

_COLUMNS = ("layer", "FLOPs", "kept", "dense ms", "gated ms", "speed-up", "efficiency", "bound")


@dataclass(frozen=True)
class LayerReport:
    """What a layer costs.

    Attributes:
        layer: Its name.
        flops_dense: Multiply-adds of the dense layer, for one sample.
        flops_executed: Multiply-adds executed, gates included, mean over samples.
        dense_ms: Milliseconds of the dense layer, for the batch.
        gated_ms: Milliseconds of the gated one.
        bound: What its time goes to: "arithmetic", "memory", or "overhead", which is the rest.
    """

    layer: str
    flops_dense: int
    flops_executed: float
    dense_ms: float
    gated_ms: float
    bound: str

    @property
    def kept(self) -> float:
        """Fraction of the multiply-adds that is executed."""
        return self.flops_executed / self.flops_dense

    @property
    def speedup(self) -> float:
        """Milliseconds dense over gated."""
        return self.dense_ms / self.gated_ms

    @property
    def efficiency(self) -> float:
        """Speed-up × kept: 1 where all that was saved in FLOPs was saved in time."""
        return self.speedup * self.kept

    def to_dict(self) -> dict[str, Any]:
        """The attributes and what follows from them, JSON-able."""
        return asdict(self) | {"kept": self.kept, "speedup": self.speedup, "efficiency": self.efficiency}

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        flops = f"{self.flops_dense / 1e6:,.1f} M"
        times = f"{self.dense_ms:.3f}", f"{self.gated_ms:.3f}"
        ratios = f"{self.speedup:.2f}×", f"{self.efficiency:.2f}"
        return self.layer, flops, f"{self.kept:.3f}", *times, *ratios, self.bound


@dataclass(frozen=True)
class Report:
    """FLOPs and milliseconds of a gated network; prints as a table.

    Attributes:
        layers: The layers, in order, each timed while the whole network runs.
        total: The whole network, timed by itself.
        batch: Samples in the batch.
        threads: Threads that computed.
        device: Where.
        dtype: In which precision.
        dense_layers: How the dense layers were computed.
        dense_total: How the dense network was computed: the fastest way found.
        missing: Dense ways that could not be tried, and why.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    batch: int
    threads: int
    device: str
    dtype: str
    dense_layers: str
    dense_total: str
    missing: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        facts = {name: value for name, value in vars(self).items() if name not in ("layers", "total")}
        layers = [layer.to_dict() for layer in self.layers]
        return facts | {"missing": dict(self.missing), "layers": layers, "total": self.total.to_dict()}

    def headline(self) -> str:
        """What was measured, in one line."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"Batch {self.batch}, {self.dtype}, {self.device}, {threads}"

    def footnote(self) -> str:
        """What the numbers are compared with."""
        missing = "".join(f" Not tried: {name} ({reason})." for name, reason in self.missing.items())
        return (
            f"Layers: timed inside the running network, against those of the dense network, {self.dense_layers}. Total:"
            f" the whole network by itself, against the fastest dense one found, {self.dense_total}; layers do not add"
            f" up to it. FLOPs are multiply-adds of one sample; efficiency is speed-up × kept.{missing}"
        )

    def to_markdown(self) -> str:
        """The table in Markdown."""
        align = "| --- |" + " ---: |" * (len(_COLUMNS) - 2) + " --- |"
        rows = [_COLUMNS, *(layer.cells() for layer in (*self.layers, self.total))]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([self.headline(), "", lines[0], align, *lines[1:], "", self.footnote()])

    def __rich__(self) -> Table:
        table = terminal_table(_COLUMNS, title=self.headline(), words=_COLUMNS[-1:], caption=self.footnote())
        for layer in self.layers:
            table.add_row(*layer.cells(), end_section=layer is self.layers[-1])
        table.add_row(*self.total.cells(), style="bold")
        return table

    def __str__(self) -> str:
        return self.to_markdown()

    _repr_markdown_ = to_markdown


def report(
    model: nn.Module, example: Tensor, *, threads: int | None = None, seconds: float = 4.0, compiled: bool = True
) -> Report:
    """Say what the saved FLOPs of a gated network bought in milliseconds.

    The dense network has the same weights with every gate open, normalisations folded, computed in the fastest way
    that plain PyTorch offers here. Nothing is measured before all of them compute the same.

    Args:
        model: A `GatedResNet`, a gated block or a `GatedConv2d` in evaluation mode, or what `gatedkernels.optimize`
            made of it, which may be under `gatedkernels.fix_gates`. It stays as it is.
        example: The batch to run on.
        threads: Threads to compute with; None: PyTorch's setting.
        seconds: How long to measure, layers and whole networks together.
        compiled: Whether the dense ways include ``torch.compile``.

    Returns:
        The report; print it, or see `Report.to_dict`.

    Raises:
        TypeError: If the model is none of these, the example no tensor, or a number none.
        ValueError: If the model is in training mode, the example is empty, or the gates of a model that is not
            optimised have hooks, such as those of `gatedkernels.fix_gates`, which its optimised copy would not have.
        RuntimeError: If the networks do not compute the same.
    """
    check_module("model", model)
    check_type("example", example, Tensor, "a tensor of images")
    check_number("seconds", seconds, above=0)
    with use_threads(threads) as used:
        fast = _optimized(model, example)
        counts = count_flops(fast, example)
        dense = dense_baselines(model, example, compiled=compiled)
        verify(build_twin(model, gated=True), {"the model": model, "the optimised model": fast}, dense, example)
        layers = [name for name in _layer_names(model) if _share(counts, name).dense]
        twin, dense_layers = build_twin(model), "channels-last"
        if "prepacked" in dense.calls:
            twin, dense_layers = prepack(twin), "prepacked"
        x = example.contiguous(memory_format=torch.channels_last)
        watches = time_layers({"dense": (twin, x), "gated": (fast, example)}, layers, seconds=seconds / 2)
        calls = {**dense.calls, "gated": lambda: fast(example)}
        times = {
            name: Timing.of(samples).median * 1e3
            for name, samples in interleave(calls, seconds=seconds / 2, device=example.device).items()
        }
        best = min(dense.calls, key=lambda name: times[name])
        rows = [_layer_report(name, model, twin, counts, watches, example, used) for name in layers]
        total = LayerReport("total", counts.dense, counts.executed, times[best], times["gated"], _main_bound(rows))
    dtype = str(example.dtype).removeprefix("torch.")
    missing = dense.missing if compiled else dense.missing | {"compiled": "not asked for"}
    return Report(tuple(rows), total, len(example), used, example.device.type, dtype, dense_layers, best, missing)


def _optimized(model: nn.Module, example: Tensor) -> nn.Module:
    modules = list(model.modules())
    if any(isinstance(module, Packed) for module in modules):
        return model
    if any(getattr(module, "is_gate", False) and module._forward_hooks for module in modules):
        raise ValueError("model must have gates without hooks, got some: optimise it first, then set its gates")
    return optimize(model, example)


def _layer_names(model: nn.Module) -> list[str]:
    return ["conv1", *model.blocks(), "fc"] if isinstance(model, GatedResNet) else [""]


def _share(counts: FlopCount, layer: str) -> FlopCount:
    """The part of a count that belongs to one layer."""
    inside = f"{layer}." if layer else ""
    return FlopCount(tuple(c for c in counts.per_layer if c.name == layer or c.name.startswith(inside)))


def _layer_report(
    name: str,
    model: nn.Module,
    twin: nn.Module,
    counts: FlopCount,
    watches: dict[str, Stopwatch],
    example: Tensor,
    threads: int,
) -> LayerReport:
    flops = _share(counts, name)
    dense_s, gated_s = (Timing.of(watches[side].samples[name]).median for side in ("dense", "gated"))
    arithmetic = flops.executed * len(example) / peak_macs(example.device, example.dtype, threads)
    weights = sum(tensor.numel() for tensor in twin.get_submodule(name).buffers())
    # Filters that at least one sample of the batch needs, if their masks are independent.
    read = weights * (1 - (1 - min(flops.kept, 1.0)) ** len(example))
    num_bytes = (read + watches["gated"].elements[name]) * example.element_size()
    memory = num_bytes / bandwidth(example.device, num_bytes, threads)
    bound = _bound(gated_s, arithmetic, memory)
    return LayerReport(name or type(model).__name__, flops.dense, flops.executed, dense_s * 1e3, gated_s * 1e3, bound)


def _bound(seconds: float, arithmetic: float, memory: float) -> str:
    """What most of the time goes to, if arithmetic and memory traffic overlap as far as they can."""
    name, longest = max(("arithmetic", arithmetic), ("memory", memory), key=lambda part: part[1])
    return name if longest >= seconds / 2 else "overhead"


def _main_bound(rows: list[LayerReport]) -> str:
    """The bound under which most of the layers' time is spent."""
    spent: dict[str, float] = {}
    for row in rows:
        spent[row.bound] = spent.get(row.bound, 0.0) + row.gated_ms
    return max(spent, key=lambda bound: spent[bound])
