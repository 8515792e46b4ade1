"""The commands ``gatedkernels report``, ``gatedkernels doctor``, and ``evaluate`` of slimmable runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from gatedkernels import policy
from gatedkernels.inference import optimize
from gatedkernels.reporting.doctor import examine, render, tiles_in_effect
from gatedkernels.reporting.latency import latency_rows
from gatedkernels.reporting.plot import speedup_plot
from gatedkernels.reporting.report import report as report_layers
from gatedkernels.reporting.tables import terminal_table
from gatedkernels.reporting.widths import width_costs, width_plot

if TYPE_CHECKING:
    from gatedkernels.training.config import Device, Measure, TrainConfig


def report(run: Path, *, device: str = "cpu", batch_sizes: Sequence[int] = (1, 16)) -> None:
    """Time a trained network on its test images, layer by layer and in all; print it, and write it into its folder.

    The folder receives ``latency-<device>.json`` (rows and layers), ``.md`` and ``.png``.

    Args:
        run: Folder of a training run.
        device: Where to measure.
        batch_sizes: Images in a batch.

    Raises:
        RunError: If the folder holds no finished epoch or cannot be written, its files are damaged, the device is
            missing, or there are too few test images.
        DataError: If the images cannot be read.
    """
    from gatedkernels.training.errors import RunError
    from gatedkernels.training.run import load_run
    from gatedkernels.training.run_folder import write_atomically, write_json

    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device must be available, got 'cuda', and PyTorch finds no CUDA device")
    config, backbone = load_run(run)
    images = _test_images(config, max(batch_sizes)).to(device)
    backbone = backbone.to(device)

    console = Console()
    fast = optimize(backbone, images[:1])
    layers = []
    for batch in batch_sizes:
        with console.status(f"Timing layers, batch {batch} …"):
            layers.append(report_layers(fast, images[:batch], compiled=False))
        console.print(layers[-1])
    with console.status("Timing the network against every dense way …"):
        rows = latency_rows(backbone, images, width=config.width, batch_sizes=batch_sizes)
    console.print(_summary(rows))

    stem = f"latency-{device}"
    text = "\n\n".join(["# Milliseconds and FLOPs", *(table.to_markdown() for table in layers), _summary(rows)])
    try:
        write_json(
            run / f"{stem}.json",
            {
                "latency": rows,
                "layers": [table.to_dict() for table in layers],
                "thresholds": policy.in_effect(),
                "tiles": tiles_in_effect(),
            },
        )
        write_atomically(run / f"{stem}.md", lambda path: path.write_text(f"{text}\n"))
        write_atomically(run / f"{stem}.png", lambda path: speedup_plot(rows, path))
    except OSError as error:
        raise RunError(f"run must be a folder that can be written, got {run}: {error.strerror}") from error
    console.print(f"Written to {run}: {stem}.json, {stem}.md, {stem}.png")


def evaluate_widths(
    run: Path,
    *,
    measures: Sequence["Measure"],
    widths: Sequence[float],
    data_dir: Path | None = None,
    batch_size: int = 256,
    device: "Device" = "auto",
) -> None:
    """Measure a trained slimmable network at some widths: accuracies, multiply-adds, milliseconds; print and write it.

    The folder receives ``evaluation.json`` and ``widths.png``.

    Args:
        run: Folder of a training run.
        measures: Which accuracies.
        widths: The widths; a run of one fixed width has that alone.
        data_dir: Where the images are, if they have moved.
        batch_size: Images at a time for the accuracies.
        device: Where to compute.

    Raises:
        RunError: If the folder holds no finished epoch or its files are damaged, or there are too few test images.
        DataError: If the images cannot be read.
    """
    from gatedkernels.training.augment import plain_view
    from gatedkernels.training.run import evaluate_slimmable_run, load_run_data, load_slimmable_run
    from gatedkernels.training.run_folder import write_atomically, write_json

    config, _ = load_slimmable_run(run)
    results, backbone = evaluate_slimmable_run(
        run, measures=measures, widths=widths, data_dir=data_dir, batch_size=batch_size, device=device
    )
    data = load_run_data(config, data_dir)
    view = plain_view(config.image_size, data.mean, data.std)
    batches = [batch for batch in (1, 16) if batch <= len(data.test)]
    images = torch.stack([view(data.test[index]) for index in range(max(batches))])
    place = next(backbone.parameters()).device
    costs = width_costs(backbone, images.to(place), [row["width"] for row in results["widths"]], batch_sizes=batches)
    for row, cost in zip(results["widths"], costs, strict=True):
        row.update(cost)
    results.update({"device": str(place), "threads": torch.get_num_threads(), "thresholds": policy.in_effect()})
    write_json(run / "evaluation.json", results)
    write_atomically(run / "widths.png", lambda path: width_plot(results["widths"], path, measure=measures[0]))
    console = Console()
    console.print(_widths_table(results, measures))
    console.print(f"Written to {run}: evaluation.json, widths.png")


def _widths_table(results: dict[str, Any], measures: Sequence[str]) -> Table:
    """Lay out one row a width, untrained networks in brackets; accuracies of a trained classifier have no such."""
    rows = results["widths"]
    batches = list(rows[0]["ms"])
    pixels = ", ".join(f"{name} {value:.3f}" for name, value in results["accuracy"]["pixels"].items())
    title = f"{results['method']}, {results['epochs']} epochs (in brackets: untrained; raw pixels: {pixels})"
    measures = [*measures, *(["classifier"] if "classifier" in rows[0]["accuracy"] else [])]
    columns = ["width", "MMACs", "M params", *(f"ms, batch {batch}" for batch in batches), *measures]
    table = terminal_table(columns, title=title)
    for row in rows:
        times = [f"{row['ms'][batch]['median']:.3f}" for batch in batches]
        scores = [_score(row, name) for name in measures]
        table.add_row(f"{row['width']:g}", f"{row['macs'] * 1e-6:.1f}", f"{row['params'] * 1e-6:.2f}", *times, *scores)
    return table


def _score(row: dict[str, Any], measure: str) -> str:
    untrained = row["random_init"].get(measure)
    return f"{row['accuracy'][measure]:.3f}" + ("" if untrained is None else f" ({untrained:.3f})")


def tune(run: Path, *, batch_sizes: Sequence[int] = (1, 16), dtype: str = "float32") -> None:
    """Measure tiles for the Triton convolutions of a trained network on this GPU, print and store them.

    Args:
        run: Folder of a training run.
        batch_sizes: To measure for.
        dtype: Numbers to compute with.

    Raises:
        RunError: If the folder holds no finished epoch, its files are damaged, the device is missing, there are too few
            test images, or nothing can be measured or stored.
        DataError: If the images cannot be read.
    """
    from gatedkernels import tuning
    from gatedkernels.training.errors import RunError
    from gatedkernels.training.run import load_run

    if not torch.cuda.is_available():
        raise RunError("tune measures on a CUDA device, and PyTorch finds none")
    config, backbone = load_run(run)
    numbers = getattr(torch, dtype)
    images = _test_images(config, max(batch_sizes)).to("cuda", numbers)
    fast = optimize(backbone.to("cuda", numbers), images[:1])
    console = Console()
    for batch in batch_sizes:
        try:
            tuning.tune(fast, images[:batch], progress=console.print)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(str(error)) from error
    console.print(f"Written to {tuning.path()}")


def _test_images(config: "TrainConfig", number: int) -> torch.Tensor:
    """The first test images of a run."""
    from gatedkernels.training.augment import plain_view
    from gatedkernels.training.errors import RunError
    from gatedkernels.training.run import load_run_data

    data = load_run_data(config)
    if len(data.test) < number:
        raise RunError(f"batch sizes must not exceed the {len(data.test)} test images, got {number}")
    view = plain_view(config.image_size, data.mean, data.std)
    return torch.stack([view(data.test[index]) for index in range(number)])


def doctor() -> None:
    """Print versions, libraries found and why not, instruction sets, GPUs and policy."""
    Console().print(render(examine()))


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    """The whole network once more: the tables spare their readers the minutes of torch.compile."""
    head = "The whole network again, now against every dense way, torch.compile too where there is a compiler:"
    lines = (
        f"Batch {row['batch']}: {row['gated_ms']:.3f} ms gated, {row['dense_best_ms']:.3f} ms for the best dense "
        f"PyTorch, {row['masked_ms']:.3f} ms masked: {row['speedup']:.2f} times as fast with {row['kept']:.1%} of the "
        f"FLOPs kept (efficiency {row['efficiency']:.2f})."
        for row in rows
    )
    return "\n".join([head, "", *lines])
