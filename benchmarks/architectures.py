r"""Many architectures of transformers, small and with random weights: is what prac says of them true?

    python benchmarks/architectures.py                             # all, in a few minutes
    python benchmarks/architectures.py --only llama whisper        # some
    python benchmarks/architectures.py --json /tmp/rows.json       # the rows somewhere else
    python benchmarks/architectures.py --list                      # the names

Each is trained for two steps of some 4 × 32 tokens in training mode, dropout included: plainly, exactly (32 bits
everywhere) and with `lean` and `small`, with `example=batch` and without. Of the second step:

- live: bytes that the forward pass made and that are alive at its end, followed by weak references to storages;
- saved: the same as autograd's hooks show it; kept: as `prac.memory.track_kept` reports it;
- promised: what `handle.summary()` says for each compressed layer, times the rows that it read. It is broken where the
  layer alone saves more (attention: more than that and what its code keeps in plain training beside q, k, v and its
  output), or all that it saves is less. What lies between compressed layers is promised by nobody;
- gradients in 32 bits against plain training's with the same random numbers, largest error of a parameter, in units of
  its largest value (or a thousandth of the model's largest, if that is more), and parameters with None in one alone;
- after `del`, with the garbage collector off: parameters that are alive, then after it has run.

Writes `results/architectures.json`, prints a table and what is wrong by name; ends with 1 if anything is.
"""

from __future__ import annotations

import argparse
import gc
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from faults import faults
from outside import Living, Rows, Saved, saved, without_collector
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ARCHITECTURES, Architecture, Batch, seed

import prac
from prac import PRESETS, Bits, Config
from prac.convert.summary import Row as Layer
from prac.lab.report import results
from prac.memory import track_kept
from prac.runtime.running import running

HERE = Path(__file__).parent / "results"
EXACT = Config(**{kind: Bits(32) for kind in ("linear", "norm", "activation", "group")})
CONFIGS: dict[str, Config | None] = {"plain": None, "exact": EXACT, "lean": PRESETS["lean"], "small": PRESETS["small"]}
SMALL = 1e-3  # of a model's largest gradient: below that, errors are measured against this
Row = dict[str, Any]
Gradients = dict[str, Tensor | None]


def loss_of(output: Any) -> Tensor:
    """The model's loss, or the mean square of what it returns."""
    loss = getattr(output, "loss", None)
    return loss if loss is not None else output.logits.square().mean()


def forward(model: nn.Module, batch: Batch, number: int) -> Tensor:
    """The loss of one step, with the random numbers of that step."""
    seed(number)
    return loss_of(model(**batch))


def gradients(model: nn.Module, batch: Batch, number: int) -> Gradients:
    """Of one step; none are left on the model."""
    forward(model, batch, number).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def compress(model: nn.Module, batch: Batch, config: Config | None, example: bool) -> prac.Handle | None:
    """As a user would; None for plain training."""
    return None if config is None else prac.compress(model, config, **({"example": batch} if example else {}))


# --- one model, one way ------------------------------------------------------------------------


@dataclass
class Plain:
    """What plain training is compared with: its gradients, what it saved, how many rows each module read."""

    steps: list[Gradients] = field(default_factory=list)
    saved: Saved = field(default_factory=Saved)
    rows: dict[str, int] = field(default_factory=dict)


def measured(architecture: Architecture, config: Config | None, example: bool, plain: Plain) -> Row:
    """Bytes and gradients of one way to train, compared with ``plain``, which plain training itself fills."""
    model = architecture.build()
    batch = architecture.batch(model)
    handle = compress(model, batch, config, example)
    steps = [gradients(model, batch, number) for number in (1, 2)]
    if config is None:
        plain.steps, plain.rows = steps, rows_read(architecture)
    compared = [compare(ours, theirs) for ours, theirs in zip(steps, plain.steps, strict=True)]

    known = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
    with Living(known) as living:
        loss = forward(model, batch, 2)
    at_once = living.bytes(without=[loss])
    gc.collect()
    row = {"live_bytes": living.bytes(without=[loss]), "cyclic_bytes": at_once - living.bytes(without=[loss])}
    del loss
    with running(model) as names, saved(known, names) as hooks:
        forward(model, batch, 2)
    with track_kept(model, batch) as kept:
        forward(model, batch, 2)
    row |= {"saved_bytes": hooks.bytes, "kept_bytes": kept.total}
    row |= {name: max(each[name] for each in compared) for name in ("largest_error", "whole_error")}
    row["none_differs"] = sorted({name for each in compared for name in each["none_differs"]})
    if handle is None:
        plain.saved = hooks
    else:
        layers = [each for each in handle.rows() if each.compressed]
        row["compressed"] = {kind: sum(r.what == kind for r in layers) for kind in sorted({r.what for r in layers})}
        row["promised_bytes"] = sum((each.after or 0) * plain.rows.get(each.name, 0) for each in layers)
        row["promise_broken"] = {each.name: found for each in layers if (found := broken(each, hooks, plain))}
    return row


def broken(layer: Layer, hooks: Saved, plain: Plain) -> tuple[int, int, int] | None:
    """Promised bytes, those that the layer alone saved and all that it saved, if they do not agree."""
    if layer.after is None:  # in full, as its own code keeps it
        return None
    rows = plain.rows.get(layer.name, 0)
    promised, (alone, together) = (layer.after or 0) * rows, hooks.of(layer.name)
    # The model's own code runs inside a compressed attention, and keeps masks and rotations.
    own = plain.saved.of(layer.name)[1] - (layer.before or 0) * rows if layer.what == "attention" else 0
    rounding = rows / 2 if layer.what == "attention" else 0  # keys and values by the token of a query
    fits = alone - max(0, own) - rounding <= promised <= together + rounding
    return None if fits else (promised, alone, together)


def rows_read(architecture: Architecture) -> dict[str, int]:
    """How many rows each module reads in a step."""
    model = architecture.build()
    rows = Rows(model)
    forward(model, architecture.batch(model), 2)
    return rows.of


def compare(ours: Gradients, theirs: Gradients) -> Row:
    """The largest relative error of a parameter, that of all together, and where one alone is None."""
    both = [(a.double(), b.double()) for name, b in theirs.items() if b is not None and (a := ours[name]) is not None]
    largest = max(float(b.abs().max()) for _, b in both)
    squares = [float((a - b).square().sum()) for a, b in both]
    return {
        "largest_error": max(float((a - b).abs().max()) / max(float(b.abs().max()), SMALL * largest) for a, b in both),
        "whole_error": (sum(squares) / sum(float(b.square().sum()) for _, b in both)) ** 0.5,
        "none_differs": [name for name, b in theirs.items() if (b is None) != (ours[name] is None)],
    }


def outlived(architecture: Architecture, config: Config | None, example: bool) -> Row:
    """What is alive after ``del``, before and after the garbage collector."""
    model = architecture.build()
    batch = architecture.batch(model)
    parameters = [weakref.ref(p) for p in model.parameters()]
    inputs = [weakref.ref(t) for t in tree_leaves(batch) if isinstance(t, Tensor)]
    with without_collector():
        with Living([]) as living:
            handle = compress(model, batch, config, example)
            for number in (1, 2):
                forward(model, batch, number).backward()
        del model, batch, handle
        count = [sum(ref() is not None for ref in refs) for refs in (parameters, inputs)]
        row = {"parameters": len(parameters), "alive_at_once": count[0], "batch_alive_at_once": count[1]}
    gc.collect()
    count = [sum(ref() is not None for ref in refs) for refs in (parameters, inputs)]
    return row | {"alive": count[0], "batch_alive": count[1], "bytes_alive": living.bytes()}


def rows_of(architecture: Architecture) -> list[Row]:
    """One for each way; what fails has its error in place of numbers."""
    plain, found = Plain(), list[Row]()
    architecture.build()  # imports what it is made of
    gc.collect()
    gc.freeze()  # and what there is by now need not be looked through at every collection
    for setting, config in CONFIGS.items():
        for example in (False, True) if config else (False,):
            row: Row = {"architecture": architecture.name, "class": architecture.of_class, "kind": architecture.kind}
            row |= {"setting": setting, "example": example, "error": ""}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    row |= measured(architecture, config, example, plain)
                    row |= outlived(architecture, config, example)
                except Exception as error:  # one architecture's failure is a row, not the end
                    row["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            row["warnings"] = sorted({str(each.message).splitlines()[0] for each in caught})
            row["faults"] = faults(row, found[0] if found else row, found[-1] if example else None)
            found.append(row)
    return found


# --- the command -------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """One line for each architecture."""
    shown = Table(title="Live bytes of a step over plain's, without an example / with it; gradients in 32 bits")
    for heading in ("architecture", "kind", "plain KiB", "lean", "small", "32 bits", "None", "alive", "faults"):
        left = heading in ("architecture", "kind")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=heading == "architecture")
    for name in dict.fromkeys(row["architecture"] for row in rows):
        of = [row for row in rows if row["architecture"] == name]
        plain = of[0].get("live_bytes", 0)
        ratios = {
            setting: " / ".join(
                f"{row['live_bytes'] / plain:.2f}" if "live_bytes" in row else "–"
                for row in of
                if row["setting"] == setting
            )
            for setting in ("lean", "small")
        }
        exact = [row["largest_error"] for row in of if row["setting"] == "exact" and "largest_error" in row]
        shown.add_row(
            name, of[0]["kind"], f"{plain / 1024:,.0f}", ratios["lean"], ratios["small"],
            f"{max(exact):.0e}" if exact else "–", str(max(len(row.get("none_differs", ())) for row in of)),
            str(max(row.get("alive", 0) for row in of)), str(sum(len(row["faults"]) for row in of)),
        )  # fmt: skip
    return shown


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(ARCHITECTURES), help="these architectures")
    parser.add_argument("--json", type=Path, default=HERE / "architectures.json", help="where the rows go")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(ARCHITECTURES)):
        parser.error(f"unknown architecture {', '.join(unknown)}; --list shows the names.")
    return arguments


def main() -> int:
    arguments = parsed()
    if arguments.list:
        print(*ARCHITECTURES, sep="\n")
        return 0
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more take longer for tensors of this size
    console = Console()
    rows: list[Row] = []
    for name in arguments.only:
        rows += rows_of(ARCHITECTURES[name])
        for row in rows:
            if row["architecture"] == name and row["faults"]:
                way = f"{row['setting']}{', example' if row['example'] else ''}"
                console.print(
                    f"{name}, {way}: {'; '.join(row['faults'])}", markup=False, highlight=False, soft_wrap=True
                )
    results.write(arguments.json, "benchmarks/architectures.py", rows)
    console.print(table(rows))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
