"""Figures for many methods at once: what each costs in memory, time and loss."""

from __future__ import annotations

import math
import statistics
from typing import Any

import matplotlib
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.path import Path

from prac.lab.report import labels, noise
from prac.lab.report.plots import INK, KINDS, PALETTE, STYLE, stacked, svg
from prac.lab.report.results import Row, baseline, by_method, mean, summary, validation
from prac.lab.report.table import above

MANY = 4  # from so many methods on, these are drawn
# Nats above plain: what nobody minds, and what no spread excuses.
SMALL, LARGE = 0.01, 0.03


def frontier(rows: list[Row]) -> str:
    """Peak memory against time per token, both in units of the baseline's, coloured by the loss above it.

    The line joins the methods that nothing beats in both, among those whose loss is not seen to be above the baseline's
    (:func:`point`).
    """
    base, points = baseline(rows), against_baseline(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.2), layout="constrained")
        axes = figure.subplots()
        gaps = [point["gap"] for point in points.values()]
        top = max(0.05, sorted(gaps)[-1] if len(gaps) < 4 else sorted(gaps)[-2])  # one outlier takes no colours away
        look: dict[str, Any] = {"cmap": "viridis_r", "norm": Normalize(0, top)}
        best = sorted((p["time"], p["peak"]) for p in points.values() if p["harmless"])
        line: list[tuple[float, float]] = []
        for time, peak in best:
            if not line or peak < line[-1][1]:
                line.append((time, peak))
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, linestyle=":", zorder=1)
        dots = axes.scatter(
            [p["time"] for p in points.values()], [p["peak"] for p in points.values()], c=gaps, s=50, zorder=3,
            edgecolors=[INK if p["harmless"] else "none" for p in points.values()], linewidths=1.3, **look,
        )  # fmt: skip
        spreads = [[(p["time"] + side * p["time_spread"], p["peak"]) for side in (-1, 1)] for p in points.values()]
        for spread in spreads:
            axes.plot(*zip(*spread, strict=True), color=INK, linewidth=0.7, zorder=2)
        bar = figure.colorbar(dots, ax=axes, label=f"validation loss above {base} (nats)", extend="max")
        bar.outline.set_visible(False)
        axes.axhline(1, color=INK, linewidth=0.6, alpha=0.4)
        axes.axvline(1, color=INK, linewidth=0.6, alpha=0.4)
        axes.set(
            xlabel=f"time per token, {base} = 1", ylabel=f"peak memory of a step, {base} = 1",
            title="Left and low is good; ringed: no loss seen",
        )  # fmt: skip
        axes.margins(x=0.12)
        axes.set_ylim(0, 1.08 * max(p["peak"] for p in points.values()))
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        taken: list[list[tuple[float, float]]] = [line, [(left, 1), (right, 1)], [(1, low), (1, high)], *spreads]
        labels.name(axes, {name: (p["time"], p["peak"]) for name, p in points.items()}, [Path(each) for each in taken])
        return svg(figure)


def _apart(values: list[float], distance: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Ascending places near ascending values, ``distance`` apart at least, from low to high; crowds spread."""
    groups: list[list[float]] = []

    def middle(group: list[float]) -> float:
        reach = distance * (len(group) - 1) / 2
        return max(low + reach, min(high - reach, statistics.fmean(group)))

    for value in values:
        groups.append([value])
        while len(groups) > 1:
            before, last = groups[-2:]
            if middle(last) - middle(before) >= distance * (len(before) + len(last)) / 2:
                break
            groups[-2:] = [before + last]
    return [middle(group) + distance * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def against_baseline(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The :func:`point` of every method that shares a seed with the baseline.

    Raises:
        ValueError: if no method is one to compare with.
    """
    grouped, base = by_method(rows), baseline(rows)
    if base is None:
        raise ValueError(f"nothing to compare {', '.join(grouped)} with: plain, or a method of plain+…, is missing.")
    return {name: point(runs, grouped[base]) for name, runs in grouped.items() if above(runs, grouped[base])}


def point(runs: list[Row], plain: list[Row]) -> dict[str, Any]:
    """A method's means against plain's, from rows with ``time_ratio``.

    Harmless: its loss is not seen to be higher, that is by no more than twice the standard error of the difference
    (:mod:`prac.lab.report.noise` has that of one seed) nor :data:`LARGE`, or by no more than :data:`SMALL`.
    """
    gaps = above(runs, plain)
    gap, deviation = statistics.fmean(gaps), noise.deviation(gaps)
    time, time_spread = summary([row["time_ratio"] for row in runs if row["time_ratio"] is not None])
    return {
        "gap": gap,
        "difference": noise.difference(gaps),
        "harmless": gap <= max(SMALL, min(2 * deviation / math.sqrt(len(gaps)), LARGE)),
        "time": time,
        "time_spread": time_spread,
        "peak": mean(runs, "peak_bytes") / mean(plain, "peak_bytes"),
    }


def kept(runs: list[dict[str, Any]]) -> str:
    """Bytes kept for backward by kind of layer, a bar for each method."""
    first = {method: group[0] for method, group in by_method(runs).items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.1 + 0.27 * len(first)), layout="constrained")
        axes = figure.subplots()
        sizes = {
            kind: [sum(row["bytes"] for row in run["kept"] if row["kind"] == kind) / 2**20 for run in first.values()]
            for kind in KINDS
        }
        stacked(axes, list(first), {kind: widths for kind, widths in sizes.items() if any(widths)}, KINDS)
        axes.set(xlabel="MiB per micro-batch", title="Kept for backward, by kind of layer")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        return svg(figure)


def gaps(runs: list[dict[str, Any]]) -> str:
    """Validation loss above the baseline's by step, the mean over seeds, a line for each method with its name."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for run in runs:
        curves.setdefault(run["method"], {})[run["seed"]] = validation(run)
    base = baseline(runs)
    assert base is not None
    plain = curves.pop(base)
    ends: list[tuple[float, str, str, float]] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, max(4.6, 1.2 + 0.19 * len(curves))), layout="constrained")
        axes = figure.subplots()
        for index, (method, by_seed) in enumerate(curves.items()):
            colour = PALETTE[1 + index % (len(PALETTE) - 1)]
            if not (shared := [seed for seed in by_seed if seed in plain]):
                continue
            steps = [s for s in by_seed[shared[0]] if all(s in by_seed[k] and s in plain[k] for k in shared)]
            means = [statistics.fmean(by_seed[k][step] - plain[k][step] for k in shared) for step in steps]
            axes.plot(steps, means, "o-", color=colour, linewidth=1.5, markersize=3)
            ends.append((means[-1], method, colour, steps[-1]))
        title = f"Validation loss above {base}'s"
        if any(len(by_seed) == 1 for by_seed in curves.values()):
            axes.axhspan(-2 * noise.ONE_SEED, 2 * noise.ONE_SEED, color=INK, alpha=0.08, linewidth=0)
            title += "; grey: what is noise of one seed at the end"
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.01)
        low, high = axes.get_ylim()
        ends.sort()
        distance = 0.19 / (figure.get_figheight() - 0.8) * (high - low)
        places = _apart([end[0] for end in ends], distance, low, high)
        for at, (value, method, colour, step) in zip(places, ends, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 3}
            axes.annotate(method, (step, value), xytext=(1.06, at), textcoords=("axes fraction", "data"), color=colour,
                          va="center", fontsize=8.5, arrowprops=leader)  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel="nats per token", title=title)
        return svg(figure)
