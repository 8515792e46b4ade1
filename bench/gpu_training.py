"""Two runs side by side on one GPU, VICReg-Dual-Gating and VICReg, for as many epochs as there is time for.

``python -m bench.gpu_training --data-dir DIR --seconds SECONDS [--out FOLDER]``, from the root of a checkout, where DIR
holds ``train/<class>/*`` and ``test/<class>/*``. It needs what trains (`pip install gatedkernels[train]`), and no
compiled library. Words behind ``--`` are options of both runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import about
from bench.gpu_checks import ROOT
from gatedkernels.training.run_folder import RunFolder, write_json

# The paper's schedule, but that the bound is released in proportion to a shorter run, and that so short a run comes to
# its budget by a larger weight of the sparsity loss alone.
_PUBLISHED_EPOCHS, _WARMUP, _BOUND_DECAY = 500, 10, 0.02
_OPTIONS = ("--data", "imagefolder", "--budget", "0.3", "--sparsity-weight", "50", "--augment-on", "device")
# To see how long an epoch takes; without a warm-up to speak of it must not learn.
_TRIAL_EPOCHS, _TRIAL_RATE = 2, ("--lr", "1e-6")
_MASKED_IMAGES = "2048"


def commands(data_dir: Path, epochs: int, options: Sequence[str]) -> dict[str, list[str]]:
    """What is typed behind ``gatedkernels`` for either run, but for its folder.

    VICReg without gates is the same network whose gates rest to the end: both branches are the dense one.
    """
    words = ["train", "vicreg-dual", "--data-dir", str(data_dir), *_OPTIONS]
    words += ["--epochs", str(epochs), "--warmup-epochs", str(min(_WARMUP, epochs - 1)), *options]
    return {
        "vicreg-dual": [*words, "--bound-decay", f"{_BOUND_DECAY * _PUBLISHED_EPOCHS / epochs:.4g}"],
        "vicreg": [*words, "--gate-warmup-epochs", str(epochs)],
    }


def side_by_side(calls: dict[str, list[str]], out: Path) -> None:
    """Run the command line several times at once; what each prints is ``<name>.log``.

    Raises:
        RuntimeError: If one fails.
    """
    program = [sys.executable, "-c", "from gatedkernels.cli import main; main()"]
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, words in calls.items():
            with (out / f"{name}.log").open("a") as log:
                running[name] = subprocess.Popen([*program, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while None in (states := [process.poll() for process in running.values()]) and not any(states):
            time.sleep(0.1)
        failed = [name for name, process in running.items() if process.poll()]
    finally:
        for process in running.values():
            process.kill()  # the other one, where one failed
            process.wait()
    if failed:
        tail = (out / f"{failed[0]}.log").read_text()[-2000:]
        raise RuntimeError(f"{failed[0]} failed: {tail}")


def train(data_dir: Path, out: Path, epochs: int, options: Sequence[str]) -> dict[str, Path]:
    """Train both; their folders."""
    calls = commands(data_dir, epochs, options)
    folders = {name: (out / f"{name}-{epochs}").resolve() for name in calls}
    side_by_side({name: [*words, "--run-dir", str(folders[name])] for name, words in calls.items()}, out)
    return folders


def affordable(folders: dict[str, Path], seconds: float, taken: float) -> int:
    """Epochs that two runs like these take in so much time, by the slower one.

    Args:
        folders: Of the runs.
        seconds: What there is, the new runs' start and the loading of images included.
        taken: Seconds that these took, both included.
    """
    runs = [RunFolder(path).read_progress() for path in folders.values()]
    training = max(run["seconds"] for run in runs)
    return int((seconds - (taken - training)) / (training / runs[0]["epochs"]))


def evaluated(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    """Accuracies of both, and the masks of the one that has any, described in ``masks.json``."""
    side_by_side({name: ["evaluate", str(path), "--knn", "--linear"] for name, path in folders.items()}, out)
    gated = str(folders["vicreg-dual"])
    side_by_side({"vicreg-dual": ["masks", gated, "--out", str(out / "masks.json"), "--limit", _MASKED_IMAGES]}, out)
    results = {name: json.loads((path / "evaluation.json").read_text()) for name, path in folders.items()}
    del results["vicreg"]["accuracy"]["gated"], results["vicreg"]["flops"]  # its gates have learnt nothing
    return results


def table(runs: dict[str, Any]) -> str:
    """Accuracies in per cent, Markdown."""
    rows = [("raw pixels", "pixels", "vicreg"), ("untrained", "random_init", "vicreg"), ("VICReg", "dense", "vicreg")]
    rows += [("VICReg-Dual, dense", "dense", "vicreg-dual"), ("VICReg-Dual, gated", "gated", "vicreg-dual")]
    measures = list(runs["vicreg"]["accuracy"]["dense"])
    lines = [f"| | {' | '.join(measures)} | kept |", f"|---|{'---:|' * (len(measures) + 1)}"]
    for title, branch, name in rows:
        scores = " | ".join(f"{100 * runs[name]['accuracy'][branch][measure]:.1f}" for measure in measures)
        lines.append(f"| {title} | {scores} | {runs[name]['flops']['kept'] if branch == 'gated' else 1:.3g} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the command line."""
    start = clock()
    parser = argparse.ArgumentParser("python -m bench.gpu_training", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of train/<class>/* and test/<class>/*")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything; decides the number of epochs")
    parser.add_argument("--evaluation-seconds", type=float, default=240, help="of these, those to leave for evaluating")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-training", help="folder of results and runs")
    parser.add_argument("options", nargs="*", help="options of `gatedkernels train` for both runs, behind --")
    chosen = parser.parse_args(arguments)
    data_dir, out = chosen.data_dir.resolve(), chosen.out.resolve()
    if out.exists():
        parser.error(f"--out must be a new folder, {out} exists")
    out.mkdir(parents=True)
    trial = train(data_dir, out, _TRIAL_EPOCHS, [*chosen.options, *_TRIAL_RATE])
    taken = clock() - start
    epochs = affordable(trial, chosen.seconds - chosen.evaluation_seconds - taken, taken)
    if epochs <= _TRIAL_EPOCHS:
        print(f"--seconds {chosen.seconds:g} are too few; training for {_TRIAL_EPOCHS + 1} epochs all the same")
    epochs = max(_TRIAL_EPOCHS + 1, epochs)
    print(f"{epochs} epochs", flush=True)
    folders = train(data_dir, out, epochs, chosen.options)
    typed = {
        name: " ".join(["gatedkernels", *words])
        for name, words in commands(Path("DIR"), epochs, chosen.options).items()
    }
    runs = evaluated(folders, out)
    write_json(out / "training.json", {**about(), "commands": typed, "runs": runs})
    print(table(runs))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
