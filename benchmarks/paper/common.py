"""What the reproductions share: their options, the runs, what comes out.

Runs lie in one folder for each model, number of steps and batch size, so that scripts share them: the plain runs of one
figure are those of the next. Two scripts must not train at the same time with the same ``--runs``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import Claim, sentence
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from rich.table import Table

from prac.lab.commands import main
from prac.lab.commands import train as command
from prac.lab.materials import models
from prac.lab.report import plots, results
from prac.lab.report.table import spread
from prac.lab.runs import several
from prac.lab.runs.options import Options
from prac.runtime import files

RESULTS = Path(__file__).resolve().parent.parent / "results" / "paper"
COLOURS = (*plots.PALETTE, "#1b1f24")
Run = dict[str, Any]
Jobs = Mapping[str, Sequence[str]]  # options of `prac train` by the name of the run

# Table 2, validation perplexity: plain, GaLore, RSO, PRAC.
PERPLEXITY = {
    "llama-130m": {"plain": 24.41, "galore": 25.12, "rso": 25.41, "paper": 24.66},
    "llama-350m": {"plain": 18.77, "galore": 19.65, "rso": 19.57, "paper": 18.92},
    "llama-1b": {"plain": 15.33, "galore": 15.64, "rso": 15.72, "paper": 15.41},
    "gpt2-124m": {"plain": 19.83, "galore": 21.01, "rso": 22.31, "paper": 19.95},
    "gpt2-355m": {"plain": 16.26, "galore": 17.88, "rso": 18.29, "paper": 16.35},
}


# --- options and runs ------------------------------------------------------------------------


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a script: where results go, and one for each of ``defaults`` that it names."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    helps = {
        "model": (str, "a size of `prac train`"),
        "data": (str, "a text, or a hub data set such as allenai/c4:en"),
        "steps": (int, "optimizer steps"),
        "batch_size": (int, "blocks per step"),
        "methods": (str, "of `prac train`; plain is what the others are compared with"),
        "seeds": (int, "of weights and data order, the same for every method"),
        "workers": (int, "runs at a time; the processor's cores are shared out among them"),
        "runs": (Path, "run folders go here; what is complete there is not run again"),
        "out": (Path, "the table as JSON and the plot go here"),
    }
    for name, value in (defaults | {"out": RESULTS}).items():
        kind, text = helps[name]
        several = isinstance(value, list)
        shown = " ".join(map(str, value)) if several else str(value).replace("%", "%%")
        more = {"nargs": "+"} if several else {}
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} (default: {shown})", **more
        )
    return parser


TRAINING: dict[str, Any] = {
    "model": "llama-tiny",
    "data": "sotu",
    "steps": 260,
    "batch_size": 16,  # llama-tiny's recipe, as `prac compare` has it
    "seeds": [0, 1, 2],
    "workers": 2,
    "runs": Path("runs/paper"),
}
EPILOG = "Every other option goes to `prac train` as it is: --bf16, --tokenizer t5-base, --max-tokens 2600000000."


def trainer(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a script that trains, with other defaults where it has some; those that are None it lacks."""
    parser = options(doc, **{name: value for name, value in (TRAINING | defaults).items() if value is not None})
    parser.epilog = EPILOG
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ``arguments.more`` has those that are for `prac train`."""
    arguments, arguments.more = parser.parse_known_args()
    return arguments


def jobs(arguments: argparse.Namespace, settings: Jobs) -> dict[str, list[str]]:
    """Every setting with every seed; the name of a run is ``SETTING-seedN``."""
    common = ["--model", arguments.model, "--data", arguments.data, "--steps", str(arguments.steps)]
    common += ["--batch-size", str(arguments.batch_size), *arguments.more]
    return {
        f"{setting}-seed{seed}": [*common, *own, "--seed", str(seed)]
        for seed in arguments.seeds
        for setting, own in settings.items()
    }


def options_of(argv: Sequence[str], method: str = "plain") -> Options:
    """The options of a run of `prac train` with these arguments."""
    given = main.parser().parse_args(["train", *argv])
    return command.options_of(given, method, given.seed[0])


def place(arguments: argparse.Namespace) -> Path:
    """The folder of the runs of one model, number of steps and batch size."""
    return Path(arguments.runs) / f"{Path(arguments.model).name}-{arguments.steps}x{arguments.batch_size}"


def train(wanted: Jobs, folder: Path, workers: int) -> dict[str, Run]:
    """Run `prac train` for each job that is not complete yet; those that fail are named and left out.

    Raises:
        SystemExit: if none came through.
    """
    found = several.gather(wanted, folder, workers)
    if not found:
        raise SystemExit(f"no run came through; their folders are in {folder}")
    return found


def by_setting(runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """The runs of each setting, one for each seed that came through."""
    found: dict[str, list[Run]] = {}
    for name, run in runs.items():
        found.setdefault(name.rpartition("-seed")[0], []).append(run)
    return found


def rows_of(runs: Mapping[str, Run]) -> list[results.Row]:
    """Their rows, each with the name of its setting and the noise of its gradients."""
    return [
        run["row"] | {"setting": name.rpartition("-seed")[0], "gradient_variance": noise(run)}
        for name, run in runs.items()
    ]


def noise(run: Run) -> float | None:
    """What compression adds to the weight gradients of linear layers: ‖G̃ − G‖² / ‖G‖², their mean at the last reading.

    None for a run that compresses none.
    """
    if not run["layers"]:
        return None
    last = run["layers"][-1]
    linear = dataclasses.replace(last, layers=tuple(layer for layer in last.layers if layer.kind == "linear"))
    return linear.totals().get("prac/gradient_variance")


def by_seed(rows: Iterable[results.Row], key: str = "val_loss") -> dict[str, dict[int, float]]:
    """One column by setting and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["seed"]] = row[key]
    return found


def plus_minus(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation."""
    values = list(values)
    return spread(values, f".{digits}f") if values else "–"


# --- what comes out --------------------------------------------------------------------------


def document(
    name: str, rows: list[results.Row], arguments: str, paper: str, ours: str, claims: Sequence[Claim]
) -> dict[str, Any]:
    """The JSON of an experiment."""
    judged = [
        {"what": c.what, "verdict": c.verdict, "bound": c.bound, "gap": None if c.gap is None else vars(c.gap)}
        for c in claims
    ]
    said = {"arguments": arguments, "paper": paper, "ours": ours, "sentence": sentence(claims), "claims": judged}
    return results.document(f"benchmarks/paper/{name}.py", rows) | said


def save(
    name: str,
    out: Path,
    rows: list[results.Row],
    *,
    paper: str,
    ours: str,
    claims: Sequence[Claim],
    table: RenderableType,
    figure: Callable[[], Figure] | None = None,
    **more: Any,
) -> None:
    """Print the table and the sentence; write NAME.json and NAME.svg.

    Args:
        name: of the experiment, and of its script.
        out: a folder.
        rows: what was measured.
        paper: the paper's number in a few words.
        ours: ours, likewise.
        claims: of the paper.
        table: for the terminal.
        figure: makes the plot.
        **more: what else is to be in the JSON.
    """
    written = document(name, rows, shlex.join(sys.argv[1:]), paper, ours, claims)
    files.write_json(out / f"{name}.json", written | more)
    if figure is not None:
        plots.save(out / f"{name}.svg", figure)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    said = f"The paper: {paper}.\nOurs: {ours}.\n{written['sentence']}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{out / name}.json", markup=False, highlight=False, soft_wrap=True)


def table(title: str, *columns: str) -> Table:
    """A table whose first column is of names and whose others are of numbers."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def curves(runs: Mapping[str, Run], title: str) -> Figure:
    """Validation loss by step: the mean of each setting's seeds, and a band of their standard deviation."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (setting, group) in enumerate(by_setting(runs).items()):
        tables = [results.validation(run) for run in group]
        steps = [step for step in tables[0] if all(step in t for t in tables)]
        values = [[t[step] for t in tables] for step in steps]
        line(axes, steps, values, setting, index)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)", title=title)
    axes.legend(fontsize=8.5)
    return figure


def line(axes: Axes, xs: Sequence[float], values: Sequence[Sequence[float]], label: str, index: int) -> None:
    """The mean of repeated values as a line, their standard deviation as a band."""
    colour = COLOURS[index % len(COLOURS)]
    means = [statistics.fmean(v) for v in values]
    axes.plot(xs, means, "o-", color=colour, markersize=3.5, linewidth=1.6, label=label)
    if values and len(values[0]) > 1:
        spreads = [statistics.stdev(v) for v in values]
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def title(arguments: argparse.Namespace) -> str:
    """``llama-tiny on sotu, 260 steps of 16 × 128 tokens, seeds 0 1 2``."""
    seeds = " ".join(map(str, arguments.seeds))
    seq = models.recipe(arguments.model).seq_len
    return f"{arguments.model} on {arguments.data}, {arguments.steps} steps of {arguments.batch_size} × {seq} tokens, seeds {seeds}"  # noqa: E501
