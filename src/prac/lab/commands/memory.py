"""``prac memory``: its arguments, the table and the plot."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prac.lab import methods
from prac.lab.materials import models
from prac.runtime import files

if TYPE_CHECKING:
    from rich.table import Table

    from prac.lab.measured.footprint import Footprint

EXAMPLES = """
examples:
  prac memory --model llama-1b --micro-batch 128 --seq-len 256
      the peak of every method, predicted: nothing is allocated and no GPU is needed
  prac memory --model Qwen/Qwen3-8B --micro-batch 4 --seq-len 4096 --methods plain checkpoint lean --plot 8b.svg
      any model by name; three methods, and a plot of what their peaks consist of
  prac memory --model llama-350m --micro-batch 64 --seq-len 1024 --budget 24GiB
      the mildest way that fits, and what it gives up; or by how much nothing does, and what would
"""


def add_parser(commands: Any) -> None:
    """Add ``memory`` to the subcommands."""
    parser = commands.add_parser(
        "memory",
        help="peak memory of a model, batch and method, before training",
        description="Predict the peak memory of a training step, by method, without allocating it and without a GPU.",
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", default="llama-130m", metavar="NAME",
        help=f"{', '.join(models.SIZES)}; or a folder or hub name (default: llama-130m)",
    )  # fmt: skip
    what.add_argument(
        "--micro-batch", type=int, metavar="N", help="sequences at a time (default: the model's recipe's)"
    )
    what.add_argument("--seq-len", type=int, metavar="N", help="tokens of each (default: the recipe's)")
    what.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "amp"],
        help="of weights and activations; amp: weights in fp32, autocast to bf16 (default: bf16)",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--methods", nargs="+", metavar="NAME",
        help=f"{methods.CHOICES} (default: those that matter)",
    )  # fmt: skip
    how.add_argument("--loss", nargs="+", choices=["plain", "chunked", "half"], default=["plain", "chunked"],
        help="plain: of logits in float32, as transformers has it; chunked: without them; half: of logits as the model "
        "has them (default: plain chunked)",
    )  # fmt: skip
    how.add_argument("--optimizer", nargs="+", choices=["adamw", "adam-mini", "muon"], default=["adamw"],
        help="default: adamw",
    )  # fmt: skip
    how.add_argument("--include", nargs="+", metavar="GLOB", help="compress only modules whose name matches")
    how.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave alone modules whose name matches")
    how.add_argument("--budget", metavar="SIZE", help="such as 24GiB: say what fits, in place of the table")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    out.add_argument("--plot", type=Path, metavar="FILE", help="also draw what each peak consists of (svg)")
    out.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run ``prac memory``; returns 0, also where some rows refuse.

    Raises:
        ValueError: on bad input, where every row refuses, and where a budget cannot be met, with what would do.
    """
    from rich.console import Console
    from rich.progress import Progress

    from prac import memory
    from prac.lab.measured import footprint
    from prac.lab.report import results

    for path in (arguments.json, arguments.plot):
        files.check_new(path, arguments.overwrite)
    models.check(arguments.model)
    recipe = models.recipe(arguments.model)
    micro_batch = recipe.batch_size if arguments.micro_batch is None else arguments.micro_batch
    seq_len = recipe.seq_len if arguments.seq_len is None else arguments.seq_len
    if micro_batch < 1 or seq_len < 2:
        raise ValueError(f"--micro-batch must be at least 1 and --seq-len at least 2, got {micro_batch} and {seq_len}.")
    include, exclude = (tuple(globs) if globs else None for globs in (arguments.include, arguments.exclude))
    setting = footprint.Setting(arguments.model, micro_batch, seq_len, arguments.dtype, include, exclude)
    if arguments.budget:
        memory.parse_budget(arguments.budget)  # before anything is made
        model, batch = footprint.materials(setting)
        make = footprint.OPTIMIZERS[arguments.optimizer[0]]
        _, autocast = footprint.DTYPES[setting.dtype]
        with Console(stderr=True).status("trying the mildest first"):
            found = memory.choose(
                memory.Step(model, batch, make, autocast, include=include, exclude=exclude), arguments.budget
            )
        print(found)
        return 0
    chosen = methods.names(list(arguments.methods or footprint.DEFAULTS))
    for name in chosen:
        footprint.of(name)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("predicting", total=len(chosen) * len(arguments.loss) * len(arguments.optimizer))
        rows = footprint.rows(
            setting, chosen, arguments.loss, arguments.optimizer,
            lambda done: progress.update(task, advance=1, description=done),
        )  # fmt: skip
    command = {"setting": asdict(setting) | {"command": " ".join(["prac", *argv])}}
    if arguments.json:
        files.write_json(arguments.json, command | results.document("memory", [row.to_dict() for row in rows]))
    if arguments.plot:
        from prac.lab.report import plots

        files.write(arguments.plot, plots.on_white(plots.footprint([row for row in rows if not row.why_not])))
    Console().print(table(rows, setting))
    for reason in dict.fromkeys(f"{row.method}: {row.why_not}" for row in rows if row.why_not):
        print(reason)
    return 0


def table(rows: list[Footprint], setting: Any) -> Table:
    """One line per method, in a section for each loss and optimizer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from prac.runtime.text import size

    found = Table(
        title=f"{setting.model}, {setting.micro_batch} × {setting.seq_len} tokens, {setting.dtype}: predicted",
        caption="Kept: for backward. Less: of the first row's peak. Not in it: what CUDA itself takes, and what an "
        "allocator holds without using it.",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left",
    )  # fmt: skip
    optimizers = {row.optimizer for row in rows} & {"adamw", "adam-mini", "muon"}
    for index, heading in enumerate(("method", "loss", "peak", "less", "kept", "most at the peak")):
        found.add_column(heading, justify="right" if heading in ("peak", "less", "kept") else "left", no_wrap=index < 5)
        if heading == "loss" and len(optimizers) > 1:
            found.add_column("optimizer", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        largest = sorted(row.at_peak.items(), key=lambda item: -item[1])[:2]
        parts = ", ".join(f"{kind} {size(count)}" for kind, count in largest)
        names = (row.method, row.loss, row.optimizer) if len(optimizers) > 1 else (row.method, row.loss)
        less = "–" if row.reduction is None else f"{row.reduction:z.0%}"
        numbers = ("–",) * 3 if row.why_not else (size(row.peak_gib * 2**30), less, size(row.activation_gib * 2**30))
        end = after is not None and after.loss != row.loss
        found.add_row(*names, *numbers, "refused, see below" if row.why_not else parts, end_section=end)
    return found
