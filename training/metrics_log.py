"""A Lightning logger that appends one CSV row a step and can be continued."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from gatedkernels.training.run_folder import write_atomically

COLUMNS = (
    *("epoch", "step", "loss", "vicreg", "invariance", "variance", "covariance"),
    *("sparsity", "bound", "kept", "narrowest", "width", "deviation", "accuracy", "lr"),
)


class MetricsLog(Logger):
    """Losses of every step in one file, written out at once, with all the digits of a float32.

    Args:
        path: The CSV file.
        keep_steps: Rows of later steps are dropped: those that a killed run logged after its last checkpoint.
    """

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        super().__init__()
        rows = [row for row in read_metrics(path) if int(row["step"]) < keep_steps] if path.exists() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))
        self.path = path

    @property
    def name(self) -> str:
        """Nothing: the run folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: a run has one log."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {name: f"{value:.9g}" for name, value in metrics.items() if name in COLUMNS}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({**row, "epoch": int(metrics["epoch"]), "step": step})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration lies beside the log."""


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of a log; a row that a killed process left half written is left out."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] and row["lr"]]
