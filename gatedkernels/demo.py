"""The demonstration: train a gated network on handwritten digits, evaluate it, time it, and say what came out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gatedkernels.models import GatedResNet, gated_resnet18
from gatedkernels.reporting import latency_rows, speedup_plot
from gatedkernels.reporting.tables import terminal_table
from gatedkernels.training.augment import plain_view
from gatedkernels.training.config import TrainConfig
from gatedkernels.training.data import Data
from gatedkernels.training.evaluation import MEASURES
from gatedkernels.training.recipes import make_config
from gatedkernels.training.run import evaluate_run, load_run, load_run_data, train_run
from gatedkernels.training.run_folder import RunFolder, write_atomically, write_json

RECIPE = "vicreg-dual-digits"
BATCH_SIZES = (1, 16)
FULL_WIDTH_KEPT = 0.3


def run_demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run the demonstration in a folder; a run that was stopped continues, a finished training is not repeated.

    Args:
        out: The folder. It receives the run, ``report.json``, ``report.md`` and ``speedup.png``.
        seed: Decides everything random.

    Returns:
        The report.
    """
    console = Console()
    config = make_config(RECIPE, seed=seed)
    assert isinstance(config, TrainConfig)
    train_run(config, out, resume=RunFolder(out).config_file.exists())
    console.print("Evaluating …")
    results = evaluate_run(out, measures=MEASURES)
    console.print("Timing …")
    _, backbone = load_run(out)
    rows = measure_latency(backbone, config, load_run_data(config))
    report = {**results, "latency": rows}
    write_json(out / "report.json", report)
    write_atomically(out / "report.md", lambda path: path.write_text(markdown(report)))
    write_atomically(out / "speedup.png", lambda path: speedup_plot(rows, path))
    summarize(report, console)
    console.print(f"\nWritten to {out}: report.json, report.md, speedup.png")
    return report


def measure_latency(backbone: GatedResNet, config: TrainConfig, data: Data) -> list[dict[str, Any]]:
    """Time the trained network with its own masks, and a full-width one with masks set to keep 30 % of the FLOPs.

    Args:
        backbone: The trained network.
        config: Its run.
        data: Whose test images it is timed on.

    Returns:
        One row a network and batch size, as ``latency`` in the report.
    """
    view = plain_view(config.image_size, data.mean, data.std)
    images = torch.stack([view(data.test[index]) for index in range(max(BATCH_SIZES))])
    trained = latency_rows(backbone, images, width=config.width, batch_sizes=BATCH_SIZES, masks="trained")
    full = gated_resnet18(num_classes=None, stem="cifar").eval()
    example = torch.randn(max(BATCH_SIZES), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fixed = latency_rows(full, example, width=1.0, batch_sizes=BATCH_SIZES, masks="set", kept=FULL_WIDTH_KEPT)
    return [*trained, *fixed]


def accuracy_table(report: dict[str, Any]) -> Table:
    """Lay out accuracies, one row a representation."""
    accuracy = report["accuracy"]
    measures = list(dict.fromkeys(name for scores in accuracy.values() for name in scores))
    table = terminal_table(["representation", *measures], title=f"Accuracy on {report['data']['name']}")
    for name, scores in accuracy.items():
        cells = (f"{scores[measure]:.3f}" if measure in scores else "" for measure in measures)
        table.add_row(name.replace("_", " "), *cells)
    return table


def latency_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay out latencies, one row a measurement."""
    table = terminal_table(_LATENCY_COLUMNS, title="Milliseconds a batch", words=["masks"])
    for row in rows:
        table.add_row(*_latency_cells(row))
    return table


def summarize(report: dict[str, Any], console: Console) -> None:
    """Print what was trained, how good it is, what it costs and how fast it is."""
    console.print(headline(report))
    console.print(accuracy_table(report))
    console.print(latency_table(report["latency"]))


def headline(report: dict[str, Any]) -> str:
    """Say the report in a few sentences."""
    data, accuracy, flops = report["data"], report["accuracy"], report["flops"]
    gated, dense = accuracy["gated"], accuracy["dense"]
    text = (
        f"A gated ResNet-18 of {report['width']:g} times the usual width learned from {data['train']:,} images of "
        f"{data['name']}, without labels, for {report['epochs']} epochs ({report['seconds']:.0f} s). It keeps "
        f"{flops['kept']:.1%} of the FLOPs. Nearest neighbour over five folds: {gated['knn1_folds']:.3f} gated, "
        f"{dense['knn1_folds']:.3f} dense, {accuracy['random_init']['knn1_folds']:.3f} untrained, "
        f"{accuracy['pixels']['knn1_folds']:.3f} raw pixels. With five labels a class: {gated['linear_5_labels']:.3f} "
        f"gated, {dense['linear_5_labels']:.3f} dense, {accuracy['random_init']['linear_5_labels']:.3f} untrained, "
        f"{accuracy['pixels']['linear_5_labels']:.3f} raw pixels."
    )
    fastest = max(report["latency"], key=lambda row: row["speedup"], default=None)
    if fastest is None:
        return text
    return (
        f"{text} Against the best dense PyTorch it is up to {fastest['speedup']:.2f} times as fast (width "
        f"{fastest['width']:g}, batch {fastest['batch']}, masks {fastest['masks']}, {fastest['kept']:.0%} of the FLOPs "
        f"kept, {fastest['threads']} threads)."
    )


def markdown(report: dict[str, Any]) -> str:
    """Write the report as Markdown."""
    measures = list(report["accuracy"]["gated"])
    accuracy = [
        f"| {name.replace('_', ' ')} | {' | '.join(f'{scores[measure]:.4f}' for measure in measures)} |"
        for name, scores in report["accuracy"].items()
    ]
    latency = [f"| {' | '.join(_latency_cells(row))} |" for row in report["latency"]]
    return "\n".join(
        [
            "# Demonstration",
            "",
            headline(report),
            "",
            f"The recipe is `{report['method']}`: the method as published, with a narrower network and a schedule of "
            "its own, 880 steps instead of 97,000. The gates start open and rest for the first quarter; the sparsity "
            "loss weighs 100 instead of 5, because a soft penalty in so few steps would leave more FLOPs than the "
            "budget. The untrained network is the same one before training.",
            "",
            f"| accuracy | {' | '.join(measures)} |",
            f"| --- |{' --- |' * len(measures)}",
            *accuracy,
            "",
            f"| {' | '.join(_LATENCY_COLUMNS)} |",
            f"|{' --- |' * len(_LATENCY_COLUMNS)}",
            *latency,
            "",
            "Milliseconds a batch. The speed-up is against the fastest dense network; efficiency is speed-up × kept.",
            "",
            "![Speed-up against the fraction of FLOPs kept](speedup.png)",
            "",
        ]
    )


_LATENCY_COLUMNS = (
    *("width", "masks", "batch", "kept", "dense eager ms", "dense best ms", "masked ms", "gated ms"),
    *("speed-up", "efficiency"),
)


def _latency_cells(row: dict[str, Any]) -> list[str]:
    times = (f"{row[name]:.2f}" for name in ("dense_eager_ms", "dense_best_ms", "masked_ms", "gated_ms"))
    shares = (f"{row['speedup']:.2f}", f"{row['efficiency']:.2f}")
    return [f"{row['width']:g}", str(row["masks"]), str(row["batch"]), f"{row['kept']:.3f}", *times, *shares]
