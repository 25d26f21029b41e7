"""How stale may a subspace be? Fixed and growing refresh intervals in the first steps of training.

    python benchmarks/growth.py

`llama-tiny` on the State of the Union speeches with the ranks of `paper`, one seed. Prints a table and writes
`results/growth.json` and `results/growth.svg`. See docs/algorithm.md, "Stale subspaces early in training".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from prac.lab.report import plots, results
from prac.lab.runs import several
from prac.runtime import files

HERE = Path(__file__).parent / "results"
COLOURS = (*plots.PALETTE, "#000000")  # one for each setting


def fixed(interval: int) -> list[str]:
    return ["--T1", str(interval), "--T2", str(interval), "--growth", "0"]


SETTINGS = {
    "plain": ["--method", "plain"],
    "refresh at every step": ["--method", "paper", *fixed(1)],
    "every 5 steps": ["--method", "paper", *fixed(5)],
    "every 20 steps": ["--method", "paper", *fixed(20)],
    "growth 0.1, up to 20 steps": ["--method", "paper", "--T1", "20", "--T2", "20", "--growth", "0.1"],
    "every 20, linear layers only": ["--method", "paper", *fixed(20), "--norm", "none", "--activation", "none"],
    "every 20, norms only": ["--method", "paper", *fixed(20), "--linear", "none", "--activation", "none"],
    "every 20, activations only": ["--method", "paper", *fixed(20), "--linear", "none", "--norm", "none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default: 120)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of 128 tokens per step (default: 8)")
    parser.add_argument("--lr", default="2e-3")
    parser.add_argument("--runs", type=Path, default=Path("runs/growth"), help="run folders go here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    arguments = parser.parse_args()
    common = ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size), "--lr", arguments.lr]
    folders = {name: name.replace(" ", "-").replace(",", "") for name in SETTINGS}
    jobs = {folders[name]: [*own, *common] for name, own in SETTINGS.items()}
    found = several.gather(jobs, arguments.runs, arguments.workers)
    if len(found) < len(jobs):
        raise SystemExit(f"{len(jobs) - len(found)} runs failed; their folders are in {arguments.runs}")
    runs = {name: found[folder] for name, folder in folders.items()}

    table = Table(title=f"llama-tiny on sotu, {arguments.steps} steps")
    for column in ("setting", "validation loss"):
        table.add_column(column)
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, found) in enumerate(runs.items()):
        table.add_row(name, f"{found['row']['val_loss']:.3f}")
        points = [(line["step"], line["val_loss"]) for line in found["metrics"] if "val_loss" in line]
        style = "--" if "only" in name else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=COLOURS[index], label=name)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
    axes.legend(fontsize=8.5)
    files.write(HERE / "growth.svg", plots.on_white(plots.svg(figure)))
    results.write(HERE / "growth.json", "benchmarks/growth.py", [r["row"] | {"setting": n} for n, r in runs.items()])
    Console().print(table)


if __name__ == "__main__":
    main()
