"""The ``gatedkernels`` command: demo, train, evaluate, masks, report, calibrate, tune, doctor."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from gatedkernels import __version__
from gatedkernels.cli_options import as_typed, declare_options, problem_of
from gatedkernels.training.config import Device, Measure
from gatedkernels.training.errors import DataError, RunError, TrainingError
from gatedkernels.training.recipes import RECIPES, make_config

app = typer.Typer(
    name="gatedkernels",
    help="Train, evaluate and time networks that compute only what their gates open.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose boxes leave the words of an option a fifth of a terminal
)

_TRAIN_PACKAGES = {"PIL", "kornia", "lightning", "matplotlib", "safetensors", "sklearn", "torchvision"}

Run = Annotated[Path, typer.Argument(help="Folder of a training run.", show_default=False)]
OnDevice = Annotated[Device, typer.Option(help="Where to compute.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the images, if they have moved since the training.", show_default=False)
]


def main() -> None:
    """Run the command line."""
    with _explained():
        app(prog_name="gatedkernels")


@contextmanager
def _explained() -> Iterator[None]:
    """Show what a user can mend as one line, without a traceback."""
    try:
        yield
    except (DataError, RunError, TrainingError) as error:
        typer.secho(f"error: {as_typed(str(error))}", fg="red", err=True)
        raise SystemExit(1) from error
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _TRAIN_PACKAGES:
            raise
        typer.secho(f"error: {error.name} is missing; pip install 'gatedkernels[train]'", fg="red", err=True)
        raise SystemExit(1) from error


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gatedkernels {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def train(context: typer.Context, recipe: str, run_dir: Path, resume: bool, **options: Any) -> None:
    """Train a recipe; every option changes one value of it.

    The run can be killed at any time; --resume continues it after its last finished epoch, to the same losses.

    Defaults are those of vicreg-dual, us3l and us-net; docs/recipes.md says what the other recipes change. An option
    that names some recipes belongs to them and their kin alone.
    """
    from gatedkernels.training.run import train_run
    from gatedkernels.training.run_folder import RunFolder

    given = {name: value for name, value in options.items() if value is not None}
    if problem := problem_of(recipe, given, context.args):
        raise typer.BadParameter(problem)
    try:
        if resume:
            stored = RunFolder(run_dir).read_config()
            stored.check_names(given)
            config = replace(stored, recipe=recipe, **given)
        else:
            config = make_config(recipe, **given)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(as_typed(str(error))) from error
    try:
        train_run(config, run_dir, resume=resume)
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the one into the other
        typer.echo(f"\nStopped. Continue with: gatedkernels train {recipe} --run-dir {run_dir} --resume", err=True)
        raise typer.Exit(130) from stop
    typer.echo(f"Trained. Next: gatedkernels evaluate {run_dir}")


train.__signature__ = declare_options()  # type: ignore[attr-defined]
train.__annotations__ = {name: parameter.annotation for name, parameter in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
_RECIPES = textwrap.fill(", ".join(RECIPES), 76, break_on_hyphens=False)
app.command(
    help=f"{inspect.getdoc(train)}\n\n\b\nRecipes:\n{_RECIPES}",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train)


@app.command()
def evaluate(
    run: Run,
    knn: Annotated[bool, typer.Option("--knn", help="Nearest neighbour, on the test set and over five folds.")] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear probes, with all labels and with five a class.")
    ] = False,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Linear probe on new crops in each epoch, as published; slow.")
    ] = False,
    width: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            min=0.05,
            max=1.0,
            show_default=False,
            help="At which share of its channels to run a slimmable network, whatever --width it was trained with; "
            "again for several. Default: 0.25, 0.5, 0.75 and 1.",
        ),
    ] = None,
    data_dir: DataDir = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    device: OnDevice = "auto",
) -> None:
    """Measure a run's accuracy beside an untrained network's.

    And beside that of the raw pixels; by every measure if none is chosen. A gated network is measured in both branches,
    a slimmable one at each width, with multiply-adds and milliseconds.
    """
    from gatedkernels.demo import accuracy_table
    from gatedkernels.training.run import evaluate_run, is_slimmable_run

    everything = not (knn or linear or augmented)
    measures: list[Measure] = []
    if knn or everything:
        measures += ["knn1", "knn1_folds"]
    if linear or everything:
        measures += ["linear", "linear_5_labels"]
    slimmable = is_slimmable_run(run)
    if width and not slimmable:
        raise typer.BadParameter("--width is for runs of slimmable networks")
    if slimmable:
        from gatedkernels.reporting import command

        if augmented:
            raise typer.BadParameter("--augmented is for runs of gated networks")
        widths = sorted(set(width or (0.25, 0.5, 0.75, 1.0)))
        command.evaluate_widths(
            run, measures=measures, widths=widths, data_dir=data_dir, batch_size=batch_size, device=device
        )
        return
    results = evaluate_run(
        run,
        measures=measures,
        augmented=augmented,
        data_dir=data_dir,
        batch_size=batch_size,
        device=device,
    )
    console = Console()
    console.print(accuracy_table(results))
    console.print(f"The gated branch keeps {results['flops']['kept']:.1%} of {results['flops']['dense']:,} FLOPs.")
    console.print(f"Written to {run / 'evaluation.json'}")


@app.command()
def masks(
    run: Run,
    out: Annotated[Path, typer.Option(help="JSON file to write.", show_default=False)],
    limit: Annotated[int, typer.Option(min=8, help="Test images to look at.")] = 1024,
    data_dir: DataDir = None,
) -> None:
    """Describe a run's masks on its test images, and store some.

    The stored ones are for benchmarks to replay.
    """
    from gatedkernels.reporting.tables import terminal_table
    from gatedkernels.training.run import masks_of_run

    report = masks_of_run(run, out, limit=limit, data_dir=data_dir)
    columns = ("gate", "density", "always on", "always off", "union of 8", "sorted")
    table = terminal_table(columns, title="Open channels")
    for name, gate in report["gates"].items():
        union = gate["union"]
        shares = (gate["density"], gate["always_on"], gate["always_off"], union["in_order"]["8"], union["sorted"]["8"])
        table.add_row(name, *(f"{share:.3f}" for share in shares))
    console = Console()
    console.print(table)
    console.print(f"Written to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Decides everything random.")] = 0,
) -> None:
    """Train on handwritten digits, evaluate and time.

    The whole story in minutes on two cores.
    """
    from gatedkernels.demo import run_demo

    run_demo(out, seed=seed)


@app.command(context_settings={"allow_extra_args": True})
def report(
    context: typer.Context,
    run: Run,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes, one or several: 1 16 256.")] = None,
) -> None:
    """Say what a run's saved FLOPs bought in milliseconds.

    Layer by layer and in all.
    """
    if wrong := [word for word in context.args if not word.isdecimal() or int(word) == 0]:
        raise typer.BadParameter(f"batch sizes must be positive whole numbers, got {wrong[0]!r}")
    batch_sizes = (*(batch_size or ()), *map(int, context.args)) or (1, 16)
    from gatedkernels.reporting import command

    command.report(run, device=device, batch_sizes=batch_sizes)


@app.command()
def calibrate(
    channels: Annotated[list[int] | None, typer.Option(min=1, help="Channels to measure, one or several.")] = None,
    pixels: Annotated[list[int] | None, typer.Option(min=1, help="Output pixels of a batch, one or several.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to measure with and for.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds for each of some two hundred classes of calls.")] = 0.2,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Whose kernels; a thousand classes on cuda.")] = "cpu",
) -> None:
    """Measure up to which density gated kernels serve here.

    From there on PyTorch's dense ones are faster. What is measured is stored, and used from now on.
    """
    from gatedkernels import calibration, thresholds

    try:
        calibration.calibrate(
            channels=channels,
            pixels=pixels,
            threads=threads,
            seconds=seconds,
            device=device,
            progress=typer.echo,
        )
    except (OSError, RuntimeError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Written to {thresholds.path()}")


@app.command()
def tune(
    run: Run,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes, one or several.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Numbers to compute with.")
    ] = "float32",
) -> None:
    """Measure which tiles a run is fastest with on this GPU.

    What is measured is stored, and used from now on.
    """
    from gatedkernels.reporting import command

    command.tune(run, batch_sizes=batch_size or (1, 16), dtype=dtype)


@app.command()
def doctor() -> None:
    """Say what there is and what is missing.

    Versions, libraries, instruction sets, GPUs, and the thresholds in effect.
    """
    from gatedkernels.reporting import command

    command.doctor()


if __name__ == "__main__":
    main()
