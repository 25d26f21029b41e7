"""The figures of a report as inline SVG: text and axes take the page's colour, each method keeps its own."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prac.lab.report.results import by_method
from prac.monitoring.readings import Reading
from prac.runtime import files

USUAL = ("plain", "lean", "fast", "small", "paper", "pac", "rac", "finetune")
# Okabe and Ito's palette, told apart with any colour vision, and after it more of the same kind; grey for the baseline.
PALETTE = (
    "#8a8a8a", "#0a84c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b",
    "#3d3d3d", "#1b9e4b", "#a6761d", "#e7298a", "#66a61e", "#7570b3", "#b15928", "#17a2a2", "#c22326", "#5b6ee1",
)  # fmt: skip


class Colours(dict[str, str]):
    """A colour for every method: that of its place among the usual ones, or else the next one that is free."""

    def __missing__(self, method: str) -> str:
        self[method] = PALETTE[len(self) % len(PALETTE)]
        return self[method]


COLOURS = Colours({method: PALETTE[index] for index, method in enumerate(USUAL)})
NOTHING = 1e-6  # an error below this is rounding
INK = "#012345"  # stands for the page's text colour until the SVG is made
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "prac",
}

# One run as read from its folder: ``method``, ``seed``, ``metrics`` (lines), ``kept`` (by kind and block), ``spectra``.
Run = dict[str, Any]


def losses(runs: list[Run], entropy: float) -> str:
    """Training loss (smoothed) and validation points by step; seeds are thin, their mean is thick."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, max(4.2, 1.0 + 0.2 * len(by_method(runs)))), layout="constrained")
        axes = figure.subplots()
        top = 0.0
        for method, group in by_method(runs).items():
            colour = COLOURS[method]
            curves = [smooth([(row["step"], row["loss"]) for row in run["metrics"] if "loss" in row]) for run in group]
            points = [[(row["step"], row["val_loss"]) for row in run["metrics"] if "val_loss" in row] for run in group]
            if len(group) > 1:
                for curve in curves:
                    axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.5)
            axes.plot(*zip(*average(curves), strict=True), color=colour, linewidth=1.4, alpha=0.6)
            if any(points):
                axes.plot(*zip(*average(points), strict=True), "o-", color=colour, linewidth=1.8, markersize=4.5)
            axes.plot([], [], "o-", color=colour, label=method)
            start = min(len(curves[0]) - 1, len(curves[0]) // 20)
            top = max([top, curves[0][start][1], *(loss for _, loss in points[0][:1])])
        axes.axhline(entropy, color=INK, linestyle=":", linewidth=1, label="best without\ncontext (unigram\nentropy)")
        axes.set_ylim(top=max(top, entropy) + 0.15)
        axes.set(
            xlabel="optimizer step",
            ylabel="loss (nats per token)",
            title="Loss: points validation, lines training (smoothed)",
        )
        figure.legend(loc="outside right upper", fontsize=8.5)
        return svg(figure)


def kept(runs: list[Run]) -> str:
    """Bytes kept for backward, by kind of layer and by block, one colour per method."""
    first = {method: group[0] for method, group in by_method(runs).items()}
    kinds = list(dict.fromkeys(row["kind"] for run in first.values() for row in run["kept"]))
    kinds.sort(key=lambda kind: -max(_megabytes(run, "kind", kind) for run in first.values()))
    blocks = sorted({row["block"] for run in first.values() for row in run["kept"] if row["block"] is not None})
    by_kind = {m: [_megabytes(run, "kind", kind) for kind in kinds] for m, run in first.items()}
    by_block = {m: [_megabytes(run, "block", block) for block in blocks] for m, run in first.items()}
    with matplotlib.rc_context(STYLE):
        height = 1.3 + 0.13 * max(len(kinds), len(blocks)) * (len(first) + 1)
        figure = Figure(figsize=(8.6, min(max(height, 2.6), 9)), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=False)
        _bars(left, kinds, by_kind, "Kept for backward, by kind of layer", numbers=len(first) <= 4)
        _bars(right, [f"block {block}" for block in blocks], by_block, "… and by block", numbers=len(blocks) <= 8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8.5)
        return svg(figure)


def spectra(runs: list[Run]) -> str:
    """Singular values and cumulative energy of one layer's input, early (dashed) and at the end (solid)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        layer = ""
        for method, group in by_method(runs).items():
            for index, row in enumerate(group[0]["spectra"]):
                layer = row["layer"]
                values, last = row["singular_values"], index == len(group[0]["spectra"]) - 1
                look: dict[str, Any] = {"color": COLOURS[method], "linestyle": "-" if last else "--", "linewidth": 1.6}
                label = f"{method}, step {row['step']}"
                order = range(1, len(values) + 1)
                left.semilogy(order, [value / values[0] for value in values], label=label, **look)
                right.plot(order, row["energy"], **look)
        left.set(xlabel="i", ylabel="σᵢ / σ₁", title="Singular values")
        right.set(xlabel="number of directions", ylabel="share of Σσ²", title="Cumulative energy", ylim=(0, 1.02))
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
        figure.suptitle(f"Input of {layer}", x=0.01, ha="left", fontsize=11)
        return svg(figure)


def layers(readings: Sequence[Reading], title: str, top: int = 6) -> str:
    """Errors of every layer by step: the ``top`` that lose most at the end in colours, the others in grey."""
    worst = [layer.name for layer in readings[-1].worst() if layer.gradient_variance is not None][:top]
    colours = dict(zip(worst, itertools.cycle(PALETTE[1:]), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.0), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True)
        for axes, what in zip(panels, ("reconstruction_error", "gradient_variance"), strict=True):
            curves: dict[str, list[tuple[int, float]]] = {}
            for reading in readings:
                for layer in reading.layers:
                    if getattr(layer, what):  # there, and not zero: the axis is logarithmic
                        curves.setdefault(layer.name, []).append((reading.step, getattr(layer, what)))
            for name, curve in curves.items():
                look: dict[str, Any] = {"color": PALETTE[0], "linewidth": 0.8, "alpha": 0.5, "zorder": 2}
                if name in colours:
                    look = {"color": colours[name], "linewidth": 1.8, "zorder": 3}
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, **look)
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], NOTHING))
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            axes.set(xlabel="optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[0].set(title="Of what a layer reads", ylabel="squared relative error")
        panels[1].set(title="Of its gradients")
        named = [(colours[name], _short(name)) for name in worst] + [(PALETTE[0], "all others")]
        lines = [Line2D([], [], color=colour, marker="o", markersize=3, label=name) for colour, name in named]
        figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8.5)
        figure.suptitle(f"What {title} loses, layer by layer", x=0.01, ha="left", fontsize=11)
        return svg(figure)


def _short(name: str) -> str:
    """``block 3: mlp.up_proj``."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
    return f"block {found[1]}: {found[2]}" if found else name


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about 3% of the points, unbiased at the start."""
    decay = 1 - 1 / max(1.0, 0.03 * len(points))
    total = weight = 0.0
    out = []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append((step, total / weight))
    return out


def average(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element that scales to its container and takes the page's colour."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def save(path: Path, draw: Callable[[], Figure]) -> None:
    """Write what ``draw`` makes, in the style of the others, as an SVG file of its own."""
    with matplotlib.rc_context(STYLE):
        files.write(path, on_white(svg(draw())))


def on_white(figure: str) -> str:
    """The figure as an SVG file of its own: dark on white, for places that do not pass on a page's colour."""
    start = figure.index(">") + 1
    head = figure[:start].replace("<svg", '<svg style="background: white; color: #1b1f24"', 1)
    return head + figure[start:]


def stacked(axes: Axes, names: Sequence[str], sizes: dict[str, list[float]], colours: dict[str, str]) -> dict[str, Any]:
    """A horizontal bar for each name, of parts laid end to end, and its length behind it; the bars of each part."""
    left, drawn = [0.0] * len(names), {}
    for part, widths in sizes.items():
        drawn[part] = axes.barh(
            range(len(names)), widths, left=left, color=colours[part], height=0.74, label=part, zorder=2
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, total in enumerate(left):
        axes.annotate(f"{total:.1f}", (total, index), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.02)
    return drawn


def _bars(axes: Axes, names: list[str], values: dict[str, list[float]], title: str, numbers: bool) -> None:
    width = 0.8 / len(values)
    for index, (method, amounts) in enumerate(values.items()):
        places = [place + (index + 0.5) * width - 0.4 for place in range(len(names))]
        bars = axes.barh(places, amounts, width * 0.92, color=COLOURS[method], label=method)
        if numbers:
            axes.bar_label(bars, fmt="%.1f", fontsize=7.5, padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="MiB per micro-batch", title=title)


def _megabytes(run: Run, key: str, value: Any) -> float:
    return sum(float(row["bytes"]) for row in run["kept"] if row[key] == value) / 2**20


# What is there whatever is trained in greys, what may be saved in colours.
KINDS = {
    "parameters": "#6b7280", "optimizer": "#9ca3af", "gradients": "#c3c8d0", "subspaces": "#374151",
    "temporary": "#e3c58b", "norm": "#2f6fb0", "linear": "#c8553d", "activation": "#e08e79", "attention": "#6aa5a9",
    "embedding": "#8c6bb1", "logits": "#d9a520", "checkpoint": "#7fa650", "other": "#b0a08a", "batch": "#dddddd",
}  # fmt: skip


def footprint(rows: list[Any]) -> str:
    """What the predicted peak of each row consists of, as stacked bars: a panel for each loss and optimizer."""
    first = rows[0].optimizer  # galore comes with the first one
    panels: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        panels.setdefault((row.loss, first if row.optimizer == "galore" else row.optimizer), []).append(row)
    largest = max(row.peak_gib for row in rows)
    heights = [len(panel) for panel in panels.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.3 * len(rows) + 0.35 * len(panels)), layout="constrained")
        shared: dict[str, Any] = {"sharex": True, "squeeze": False, "height_ratios": heights}
        drawn: dict[str, Any] = {}
        for axes, ((loss, optimizer), panel) in zip(
            figure.subplots(len(panels), 1, **shared)[:, 0], panels.items(), strict=True
        ):
            sizes = {kind: [row.at_peak.get(kind, 0) / 2**30 for row in panel] for kind in KINDS}
            parts = stacked(axes, [row.method for row in panel], sizes, KINDS)
            drawn |= {kind: parts[kind] for kind, widths in sizes.items() if max(widths) > 0.005 * largest}
            axes.set_title(f"{loss} loss, {optimizer}", loc="left", fontsize=9.5)
        axes.set(xlabel="predicted peak (GiB)")
        kinds = [kind for kind in KINDS if kind in drawn]
        figure.legend([drawn[kind] for kind in kinds], kinds, loc="outside right upper", fontsize=8.5)
        return svg(figure)
