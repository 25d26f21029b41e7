"""A row for each thing compared, by name, and a panel for each thing measured: nothing to be looked up in a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prac.lab.report import plots

Measured = tuple[float, float] | None  # and its spread, 0 for what is counted; None where there is none


@dataclass(frozen=True)
class Panel:
    """What is measured: its title, the unit on its axis, where to draw a line to compare with, and its scale."""

    title: str
    unit: str
    reference: float | None = None
    logarithmic: bool = False


@dataclass(frozen=True)
class Entry:
    """A row: its name, its colour, and what was measured for each panel."""

    name: str
    colour: str
    values: Sequence[Measured]


def draw(groups: Mapping[str, Sequence[Entry]], panels: Sequence[Panel], note: str) -> Figure:
    """The rows of each group under its name, from the top; ``note`` says below what the bars are."""
    names: list[str] = []
    places: list[tuple[float, Entry]] = []
    for group, entries in groups.items():
        names.append(group)
        for entry in entries:
            places.append((len(names), entry))
            names.append(entry.name)
    figure = Figure(figsize=(10, 1.1 + 0.205 * len(names)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)  # so that the last tick of a panel stays clear of the next one's first
    widths = [3 if any(value and value[1] for value in column) else 2
              for column in zip(*(entry.values for _, entry in places), strict=True)]  # fmt: skip
    for index, (axes, panel) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0], panels, strict=True)
    ):
        axes.grid(visible=False, axis="y")
        for place, entry in places:
            axes.axhline(place, color=plots.INK, linewidth=0.8, alpha=0.15, zorder=0)
            if (measured := entry.values[index]) is not None:
                value, spread = measured
                axes.errorbar(value, place, xerr=spread or None, fmt="o", color=entry.colour, markersize=5, capsize=2,
                              elinewidth=0.9)  # fmt: skip
        if panel.logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if panel.reference is not None:
            axes.axvline(panel.reference, color=plots.INK, linewidth=0.8, zorder=1)
        axes.set(xlabel=panel.unit)
        axes.set_title(panel.title, fontsize=10)
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.3, -0.7)
        for place, label in enumerate(axes.get_yticklabels()):
            heading = all(place != at for at, _ in places)
            label.set(fontweight="bold" if heading else "normal", fontsize=9)
    figure.supxlabel(note, fontsize=8.5, x=0.01, ha="left")
    return figure
