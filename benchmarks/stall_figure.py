"""Why training stands still where subspaces are stale, of `results/gpu/stall.json`, which `benchmarks/gpu` measures.

python benchmarks/stall_figure.py    # the table of docs/algorithm.md; the plot is drawn by benchmarks/redraw.py
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prac.lab.report import plots, results

HERE = Path(__file__).parent
SHOWN = (
    "plain", "as printed", "as printed but the last norm", "as printed, T a quarter of the warm-up",
    "paper, activations as printed",
)  # fmt: skip
COLOURS = dict(zip(SHOWN, (plots.PALETTE[i] for i in (0, 2, 5, 4, 1)), strict=True))
LAST, INNER = "model.norm", "model.layers.2.post_attention_layernorm"


def ways(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows by way and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row.get("validation"):
            found.setdefault(row["setting"]["method"], {})[row["setting"]["seed"]] = row
    return found


def above(runs: dict[str, dict[int, dict[str, Any]]], way: str) -> list[tuple[int, float]]:
    """The loss above plain's at each validation, the mean over the seeds."""
    pairs = [(row, runs["plain"][seed]) for seed, row in runs[way].items() if seed in runs["plain"]]
    steps = [step for step, _ in pairs[0][1]["validation"]]
    off = [[a - b for (_, a), (_, b) in zip(r["validation"], p["validation"], strict=False)] for r, p in pairs]
    return [(step, statistics.mean(values)) for step, *values in zip(steps, *off, strict=False)]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss, what a norm's basis misses, and the residual stream, by step."""
    runs, figure = ways(rows), Figure(figsize=(10.5, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for way in SHOWN:
        row, colour = runs[way][0], COLOURS[way]
        steps = [step for step, _ in row["validation"]]
        left.plot(steps, [loss for _, loss in row["validation"]], color=colour, label=way)
        missed = [state[INNER][1] for state in row["norms"]]
        if None not in missed:
            middle.plot(steps, missed, color=colour)
        right.plot(steps, [state[LAST][0] for state in row["norms"]], color=colour)
    left.set(title="validation loss (nats)", xlabel="step")
    middle.set(title="norm's input outside Q1", xlabel="step", ylim=(0, 1))
    right.set(title="residual stream (rms)", xlabel="step", yscale="log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: nats above plain training at some steps, the mean over seeds."""
    runs = ways(rows)
    at = [26, 52, 78, 104, 156, 260]
    lines = ["| what is tried | seeds | " + " | ".join(map(str, at)) + " |", "| --- |" + " --- |" * (len(at) + 1)]
    for way, seeds in runs.items():
        if way == "plain":
            losses = {s: statistics.mean(dict(r["validation"])[s] for r in seeds.values()) for s in at}
            cells = [f"{losses[s]:.3f}" for s in at]
        else:
            found = dict(above(runs, way))
            cells = [f"{found[s]:+.3f}" for s in at]
        lines.append(f"| {way} | {len(seeds.keys() & runs['plain'].keys())} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(results.read(HERE / "results" / "gpu" / "stall.json")["rows"]))
