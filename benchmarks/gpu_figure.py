"""Peak memory against time of a whole training step on a GPU, a point for each way to train: `results/gpu/models.svg`.

Of the 1.3B LLaMA in `results/gpu/models.json`, which `benchmarks/gpu` measures; drawn by `python benchmarks/redraw.py`.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from prac.lab.report import plots

MODEL = "llama-1b-5504"
# Where a label stands, in points from its point.
PLACES = {"liger+checkpoint": (4, -15), "small": (7, -3)}
OURS, OTHERS = plots.PALETTE[1], "#6b7280"
NAMES = {
    "plain, no logits": "plain", "liger": "Liger-Kernel", "checkpoint": "checkpointing",
    "liger+checkpoint": "Liger-Kernel + checkpointing", "lean+attention8": "lean, attention in 8 bits",
}  # fmt: skip


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One point a row of the model that was measured without logits."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    rows = [r for r in rows if r["device"] == rows[0]["device"]]  # times of another are not to be compared
    shown = [r for r in rows if r["setting"]["model"] == MODEL and "ms" in r and not r["setting"]["logits"]]
    for row in shown:
        method, point = row["setting"]["method"], (row["ms"], row["peak_gib"])
        is_ours = method.partition("+")[0] in ("lean", "small", "paper")
        name = NAMES.get(row["name"], NAMES.get(method, method))
        axes.plot(*point, "o", color=OURS if is_ours else OTHERS, markersize=7)
        dx, dy = PLACES.get(method, (7, 3))
        axes.annotate(
            name, point, (dx, dy), textcoords="offset points", fontsize=9,
            color=OURS if is_ours else plots.INK,
        )  # fmt: skip
    axes.set(
        xlabel="time of a training step (ms)", ylabel="peak memory (GiB)", xlim=(190, 740), ylim=(0, 48),
        title=f"LLaMA of 1.3B parameters, 64 texts of 256 tokens, {shown[0]['device']}",
    )  # fmt: skip
    return figure
