"""What is installed, what was found, what is missing and why."""

import importlib.util
import math
import os
import warnings
from collections.abc import Sequence

import torch
from rich.console import Group
from rich.table import Table

from gatedkernels import _extension, policy, thresholds
from gatedkernels.reporting.machine import cpu_name, instruction_set, versions


def examine() -> dict[str, dict[str, str]]:
    """Look at versions, machine, compiled libraries and policy: facts by name, by section."""
    return {
        "versions": versions(),
        "machine": _machine(),
        "compiled kernels": {
            "cpu": _library("_cpu", _extension.CPU_ERROR),
            "cuda": _library("_cuda", _extension.CUDA_ERROR),
            "instruction set": instruction_set() or "none: operations take their definitions in PyTorch",
        },
        "policy of backend auto: up to which density the CPU's gated kernels serve (output pixels of the batch)": {
            kernel: _thresholds(rows) for kernel, rows in policy.CPU_THRESHOLDS.items()
        },
        "policy of backend auto: thresholds that were measured here, which come before those": _measured(),
        "tiles of the Triton convolutions that were measured here, which come before the shipped ones": _tiles(),
    }


def render(facts: dict[str, dict[str, str]]) -> Group:
    """Lay the facts out, one small table a section."""
    tables = []
    for title, section in facts.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, min_width=72)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in section.items():
            table.add_row(name, value)
        tables.append(table)
    return Group(*tables)


def _thresholds(rows: Sequence[tuple[float, float]]) -> str:
    return ", ".join(
        f"{density:g} ({f'≤ {pixels:g}' if math.isfinite(pixels) else 'more'})" for pixels, density in rows
    )


def _measured() -> dict[str, str]:
    """Where calibration's file lies, whether it serves, and its densities by channels and pixels."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = thresholds.load(threads)
    facts = {"file": str(thresholds.path())}
    if caught:
        facts["problem"] = str(caught[0].message)
    elif not table:
        facts["state"] = f"none for this machine, {threads} threads and these versions: gatedkernels calibrate"
    if torch.cuda.is_available():
        table |= policy.measured_on(gpu())
    for kind, by_channels in sorted(table.items()):
        facts[kind] = "; ".join(
            f"{channels} channels: {', '.join(f'{row[pixels]:g} ({pixels})' for pixels in sorted(row))}"
            for channels, row in sorted(by_channels.items())
        )
    return facts


def _tiles() -> dict[str, str]:
    """Where tuning's file lies, what of it serves on this GPU, and for which others there is something."""
    if importlib.util.find_spec("triton") is None:
        return {"state": "none: the package triton is not installed"}
    from gatedkernels.ops.ragged import measured  # imports Triton

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machines = measured.TILES.load()
    facts = {"file": str(measured.TILES.path())}
    if caught:
        facts["problem"] = str(caught[0].message)
    elif not machines:
        facts["state"] = "none: gatedkernels tune"
    here = measured.machine(gpu()) if torch.cuda.is_available() else None
    for name, entry in sorted(machines.items()):
        if name == here:
            facts |= {key: _tile(**numbers) for key, numbers in sorted(entry["tiles"].items())}
        else:
            facts[name] = f"{len(entry['tiles'])} shapes, which serve there alone"
    return facts


def tiles_in_effect() -> dict[str, dict[str, int]]:
    """The measured tiles that serve on this GPU, for a record; none without one."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return {}
    from gatedkernels.ops.ragged import measured

    return measured.in_effect(gpu())


def _tile(rows: int, channels: int, depth: int, warps: int, stages: int, splits: int, programs: int) -> str:
    schedule = f", {splits} splits" if splits > 1 else f", {programs} programs" if programs else ""
    return f"{rows}x{channels}x{depth}, {warps} warps, {stages} stages{schedule}"


def gpu() -> torch.device:
    """The CUDA device in use."""
    return torch.device("cuda", torch.cuda.current_device())


def _library(name: str, error: str | None) -> str:
    return f"missing: {error}" if error else f"loaded from {_extension.find(name)}"


def _machine() -> dict[str, str]:
    facts = {
        "processor": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": f"{torch.get_num_threads()}, oneDNN {'yes' if torch.backends.mkldnn.is_available() else 'no'}",
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    if torch.version.cuda is not None:
        facts["cuda"] = f"PyTorch was built for {torch.version.cuda}"
    return facts
