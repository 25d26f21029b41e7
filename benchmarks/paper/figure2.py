"""Figure 2: singular values of what a middle layer reads, and how few directions hold their energy, through training.

    python benchmarks/paper/figure2.py                 # every run, then the figure; goes on where it stopped

Plain training, measured before the first step and after 2%, 10%, 30% and all of the steps; the input of the first
linear layer of the middle block on validation text. The paper has one such spectrum, at 10%, and reads from it "a few
dominant singular values" and "a long tail that decays slowly". Here the first means that the 0.3n directions which
PRAC keeps as principal hold 90% of the energy at 10% of the steps; the second that from 0.1n to 0.9n σ falls more
slowly, per direction, than up to 0.1n.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
from claims import Claim, Gap
from matplotlib.figure import Figure
from rich.console import Console

from prac.lab.measured import training
from prac.lab.report import results
from prac.lab.runs import children
from prac.runtime import files

SHARES = (0.0, 0.02, 0.1, 0.3, 1.0)  # of the steps
LEVELS = (0.9, 0.95, 0.99)


def points(steps: int) -> list[int]:
    """The steps after which it is measured."""
    return sorted({round(share * steps) for share in SHARES})


def one(options: list[str], folder: Path) -> list[dict[str, Any]]:
    """Train, unless that is done, and return the spectra."""
    from prac.lab.runs import train

    path = folder / "spectra.json"
    wanted = common.options_of([*options, "--save-every", "0"])
    if (folder / "result.json").exists() and path.exists():
        train.run(wanted, folder, resume=True)  # which refuses the run if it is of other options
    else:
        _, blocks = train.prepare(wanted)
        batch = train.collate([blocks.validation[i] for i in range(min(len(blocks.validation), 64))])
        train.run(wanted, folder, callbacks=[recorder(path, batch)], overwrite=True)
    found: list[dict[str, Any]] = results.read(path)
    return found


def recorder(path: Path, batch: dict[str, Any]) -> Any:
    """A callback that writes the spectrum after each of some steps."""
    from transformers import TrainerCallback

    rows: list[dict[str, Any]] = []

    class Spectra(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            self.on_step_end(args, state, control, model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step in points(state.max_steps):
                inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
                found = training.spectrum(model, training.middle_linear(model), inputs)
                rows.append({"step": state.global_step} | found)
                files.write_json(path, rows)

    return Spectra()


def facts(row: dict[str, Any]) -> dict[str, float]:
    """What is read off a spectrum; shares are of the number of directions."""
    sigma, energy, n = row["singular_values"], row["energy"], len(row["energy"])
    held = {f"directions_{level}": next(i + 1 for i, e in enumerate(energy) if e >= level) / n for level in LEVELS}
    tenth, last = math.ceil(0.1 * n), math.floor(0.9 * n)
    # Falls of ln σ per tenth of the directions.
    head = math.log(sigma[0] / sigma[tenth - 1])
    tail = math.log(sigma[tenth - 1] / max(sigma[last - 1], 1e-30)) / 8
    return held | {"energy_0.3n": energy[math.floor(0.3 * n) - 1], "head_fall": head, "tail_fall": tail}


def draw(rows: list[results.Row], title: str) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, step in enumerate(sorted({row["step"] for row in rows})):
        group = [row for row in rows if row["step"] == step]
        order = range(1, len(group[0]["energy"]) + 1)
        look: dict[str, Any] = {"color": common.COLOURS[index], "linewidth": 1.6, "label": f"after {step} steps"}
        sigma = [[s / row["singular_values"][0] for s in row["singular_values"]] for row in group]
        left.semilogy(order, [statistics.fmean(s) for s in zip(*sigma, strict=True)], **look)
        right.plot(order, [statistics.fmean(e) for e in zip(*(r["energy"] for r in group), strict=True)], **look)
    left.set(xlabel="i", ylabel="σᵢ / σ₁", title="Singular values")
    right.set(xlabel="number of directions", ylabel="share of Σσ²", title="Cumulative energy", ylim=(0, 1.02))
    right.legend(fontsize=8.5)
    figure.suptitle(f"{rows[0]['layer']}: {title}", x=0.01, ha="left", fontsize=9)
    return figure


def spectra(arguments: Namespace) -> list[results.Row]:
    """Of every seed that comes through, one row for each step."""
    wanted = common.jobs(arguments, {"plain": ["--method", "plain"]})
    console, rows = Console(stderr=True), []
    threads = (children.threads_each(arguments.workers) or torch.get_num_threads(),)
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), torch.set_num_threads, threads) as pool:
        folder = common.place(arguments) / "spectra"  # apart from the plain runs of other scripts, which lack them
        waiting = {pool.submit(one, options, folder / name): name for name, options in wanted.items()}
        for future in as_completed(waiting):
            name = waiting[future]
            try:
                found = future.result()
            except Exception as error:
                console.print(f"{name} failed and is left out: {error}", markup=False)
                continue
            console.print(f"{name} done", markup=False)
            rows += [row | facts(row) | {"seed": int(name.rpartition("seed")[2])} for row in found]
    if not rows:
        raise SystemExit("no run came through")
    return sorted(rows, key=lambda row: (row["seed"], row["step"]))


def main() -> None:
    arguments = common.parse(common.trainer(__doc__))
    rows = spectra(arguments)
    steps = sorted({row["step"] for row in rows})
    tenth = round(0.1 * arguments.steps)
    at = [row for row in rows if row["step"] == tenth]
    n = len(rows[0]["energy"])
    claims = [
        Claim("energy outside the first 0.3n directions under 10%", Gap.of(1 - r["energy_0.3n"] for r in at), 0.1),
        Claim("tail falls more slowly than head, in ln σ per tenth of n",
              Gap.of(r["tail_fall"] - r["head_fall"] for r in at), unit="{:+.2f}"),
    ]  # fmt: skip
    columns = [f"directions for {level:.0%}" for level in LEVELS]
    table = common.table(f"{common.title(arguments)}: n = {n}", "after steps", *columns, "energy of 0.3n", "seeds")
    keys = [f"directions_{level}" for level in LEVELS]
    for step in steps:
        group = [row for row in rows if row["step"] == step]
        cells = [common.plus_minus([n * row[key] for row in group], 0) for key in keys]
        table.add_row(str(step), *cells, common.plus_minus(r["energy_0.3n"] for r in group), str(len(group)))
    held = ", ".join(f"{common.plus_minus([n * r[k] for r in at], 0)} for {level:.0%}"
                     for k, level in zip(keys, LEVELS, strict=True))  # fmt: skip
    common.save(
        "figure2", arguments.out, rows, claims=claims, table=table,
        paper="a few dominant singular values hold most of the energy, the tail is long and decays slowly (layer 10 of "
        "LLaMA-130M at 10% of the steps, a plot without numbers)",
        ours=f"at 10% of the steps, of {n} directions: {held} of the energy",
        figure=lambda: draw(rows, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
