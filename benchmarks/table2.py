"""Table 2 of the paper, its memory: the paper's numbers, and what `prac memory` predicts.

    python benchmarks/table2.py

Five models at the paper's micro-batches, AdamW, weights and activations in bfloat16. The loss takes the logits in
float32, as transformers has it, or (`half`) as they are, as some training code has it, or does without them
(`chunked`). Methods: plain training, the policy of the paper (`paper`), gradient checkpointing, `lean` and `small`.
Writes `results/table2.json` and `results/table2.svg`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prac.lab import files, footprint, plots, results

HERE = Path(__file__).parent / "results"
# Baseline and PRAC in GB, from Table 2. That of the 1B model ran out of memory: 94.5 = 60.48 / (1 - 0.36).
PAPER = {
    "llama-130m": (128, 256, 21.26, 15.65),
    "llama-350m": (128, 256, 46.10, 32.21),
    "llama-1b": (128, 256, 94.5, 60.48),
    "gpt2-124m": (64, 1024, 62.27, 49.68),
    "gpt2-355m": (32, 1024, 55.94, 44.21),
}
WAYS = (
    ("plain", "plain"),
    ("plain", "half"),
    ("paper", "plain"),
    ("paper", "half"),
    ("checkpoint", "plain"),
    ("checkpoint", "chunked"),
    ("lean", "plain"),
    ("lean", "chunked"),
    ("lean+attention8", "chunked"),
    ("small", "chunked"),
)


def rows(model: str) -> list[dict[str, Any]]:
    """The predictions for one model."""
    batch, length, baseline, theirs = PAPER[model]
    setting = footprint.Setting(model, batch, length, "bf16")
    found = []
    for method, loss in WAYS:
        it = footprint.one(setting, method, loss, "adamw")
        published = {"plain": baseline, "paper": theirs}.get(method) if loss != "chunked" else None
        found.append(
            asdict(setting)
            | {"method": method, "loss": loss, "peak_gib": it.peak / 2**30, "peak_gb": it.peak / 1e9,
               "activation_gib": it.activations / 2**30, "reduction": 1 - it.peak / (found[0]["peak_gb"] * 1e9) if found
               else 0.0, "paper_gb": published, "at_peak": it.to_dict()["at_peak"], "where": it.where}
        )  # fmt: skip
    return found


def draw(found: list[dict[str, Any]]) -> str:
    """One group of bars for each model."""
    ways = {f"{method}, {loss} loss": (method, loss) for method, loss in WAYS}
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / (len(ways) + 1)
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for index, (label, way) in enumerate(ways.items()):
            mine = [row for row in found if (row["method"], row["loss"]) == way]
            at = [i + (index - len(ways) / 2) * width for i in range(len(mine))]
            axes.bar(at, [row["peak_gb"] for row in mine], width * 0.92, label=label, color=colours[index])
            for x, row in zip(at, mine, strict=True):
                if row["paper_gb"] is not None:
                    axes.plot([x - width / 2, x + width / 2], [row["paper_gb"]] * 2, color=plots.INK, linewidth=1.6)
        axes.plot([], [], color=plots.INK, linewidth=1.6, label="as the paper has it")
        axes.set_xticks(range(len(PAPER)), [f"{m}\n{b} × {s} tokens" for m, (b, s, _, _) in PAPER.items()])
        axes.set(ylabel="predicted peak (GB)")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=8, ncols=2)
        return plots.on_white(plots.svg(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found = [row for model in track(list(PAPER), description="predicting", transient=True) for row in rows(model)]
    results.write(HERE / "table2.json", "benchmarks/table2.py", found)
    files.write(HERE / "table2.svg", draw(found))
    table = Table(title="Peak memory in GB: the paper's, and ours")
    for column in ("model", "method", "loss", "paper", "predicted", "difference", "less than plain", "paper's less"):
        table.add_column(column, justify="left" if column in ("model", "method", "loss") else "right")
    for row in found:
        baseline, theirs = PAPER[row["model"]][2:]
        published = row["paper_gb"]
        table.add_row(
            row["model"], row["method"], row["loss"], "–" if published is None else f"{published:.2f}",
            f"{row['peak_gb']:.2f}", "–" if published is None else f"{row['peak_gb'] / published - 1:+.0%}",
            f"{row['reduction']:.0%}", f"{1 - theirs / baseline:.0%}" if row["method"] == "paper" else "",
            end_section=row is found[-1] or row["method"] == "small",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
