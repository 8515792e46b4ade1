"""What the width of a slimmable network buys: multiply-adds, parameters, milliseconds."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatedkernels.inference import optimize
from gatedkernels.nn import count_flops, slice
from gatedkernels.reporting.timing import Timing, interleave


def width_costs(
    net: nn.Module,
    images: Tensor,
    widths: Sequence[float],
    *,
    batch_sizes: Sequence[int] = (1, 16),
    seconds: float = 2.0,
) -> list[dict[str, Any]]:
    """Count and time a network at some widths: each is cut out, optimised, and timed in turn with the others.

    Args:
        net: A slimmable network in evaluation mode, with statistics for each width.
        images: Shape (N, 3, H, W), N at least the largest batch.
        widths: The widths.
        batch_sizes: Images in a batch.
        seconds: How long to time each batch size.

    Returns:
        One row a width: ``width``, ``macs`` of one image, ``params``, and ``ms``, by batch size, median, low and high
        quartile.

    Raises:
        ValueError: If there are no widths, one is out of range or has no statistics, or a batch is larger than there
            are images.
    """
    if max(batch_sizes) > len(images):
        raise ValueError(f"batch_sizes must be at most the {len(images)} images, got {max(batch_sizes)}")
    narrow = {width: slice(net, width) for width in widths}
    rows: list[dict[str, Any]] = [
        {
            "width": width,
            "macs": count_flops(each, images[:1]).dense,
            "params": sum(parameter.numel() for parameter in each.parameters()),
            "ms": {},
        }
        for width, each in narrow.items()
    ]
    fast = {str(width): optimize(each, images[:1]) for width, each in narrow.items()}
    for batch in batch_sizes:
        calls = {name: partial(each, images[:batch]) for name, each in fast.items()}
        samples = interleave(calls, seconds=seconds, device=images.device)
        for row in rows:
            timing = Timing.of(samples[str(row["width"])])
            row["ms"][str(batch)] = {name: 1e3 * value for name, value in timing._asdict().items()}
    return rows


def width_plot(rows: Sequence[Mapping[str, Any]], path: Path | str, *, measure: str) -> None:
    """Plot accuracy against multiply-adds and against milliseconds, one point a width.

    Args:
        rows: Rows with ``width``, ``macs``, ``ms`` and ``accuracy`` by measure, and that of ``random_init``.
        path: The PNG file.
        measure: Which accuracy.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one width, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    batches = list(rows[0]["ms"])
    curves = [(left, [row["macs"] * 1e-6 for row in rows], "")]
    curves += [(right, [row["ms"][batch]["median"] for row in rows], f"batch {batch}") for batch in batches]
    for axes, x, label in curves:
        (line,) = axes.plot(x, [row["accuracy"][measure] for row in rows], marker="o", label=label or "trained")
        if axes is left:
            untrained = [row["random_init"][measure] for row in rows]
            axes.plot(x, untrained, marker="o", color="#9a9a9a", linestyle="--", label="untrained")
        for row, across in zip(rows, x, strict=True):
            text = f"{row['width']:g}"
            place = (across, row["accuracy"][measure])
            axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=line.get_color())
    left.set_xlabel("million multiply-adds of one image")
    left.set_ylabel(f"accuracy ({measure})")
    right.set_xlabel("milliseconds of a batch")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")
