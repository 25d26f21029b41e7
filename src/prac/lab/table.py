"""The table of methods side by side, as text cells for the terminal and the report alike."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prac.lab.results import Row, baseline, by_method, mean, summary
from prac.memory.breakdown import size


def headings(rows: list[Row]) -> tuple[str, ...]:
    """Of the columns of :func:`cells`."""
    plain = baseline(rows) or "plain"
    return (
        "method", "val loss", f"above {plain}", "perplexity", "kept for backward", "less kept", "peak memory",
        "tokens/s", "speed",
    )  # fmt: skip


def cells(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line per method under :func:`headings`, means over its seeds; ± is their standard deviation.

    What is "above plain", or another baseline, is the mean of the differences seed by seed, which share weights and
    data, and its own deviation.
    """
    grouped = by_method(rows)
    base = baseline(rows)
    plain = grouped[base] if base else None
    lines: list[tuple[str, ...]] = []
    for method, runs in grouped.items():
        less = f"{mean(plain, 'kept_bytes') / mean(runs, 'kept_bytes'):.2f}×" if plain else "–"
        speed = f"{mean(runs, 'tokens_per_s') / mean(plain, 'tokens_per_s'):.2f}×" if plain else "–"
        gaps = above(runs, plain or [])
        lines.append(
            (
                method,
                spread([row["val_loss"] for row in runs], ".3f"),
                spread(gaps, "+.3f").replace("-", "−") if gaps and method != base else "–",
                f"{mean(runs, 'val_ppl'):.1f}",
                size(mean(runs, "kept_bytes")),
                less,
                size(mean(runs, "peak_bytes")),
                f"{mean(runs, 'tokens_per_s'):,.0f}",
                speed,
            )
        )
    return lines


def above(runs: list[Row], plain: list[Row]) -> list[float]:
    """Validation losses less plain's of the same seed."""
    losses = {row["seed"]: row["val_loss"] for row in plain}
    return [row["val_loss"] - losses[row["seed"]] for row in runs if row["seed"] in losses]


def spread(values: list[float], form: str) -> str:
    """Their mean in a format such as ``+.3f``, ± their standard deviation; one alone has none."""
    centre, deviation = summary(values)
    return f"{centre:{form}} ± {deviation:.3f}" if len(values) > 1 else f"{centre:{form}}"


def render(rows: list[Row], title: str) -> Table:
    """The same as a ``rich`` table, with the entropy of the validation tokens as its reference."""
    table = Table(
        title=title,
        caption=reference(rows),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    plain = baseline(rows) or "plain"
    short = ("method", "val loss", f"− {plain}", "", "kept", "", "peak", "", "speed")  # "": no room in a terminal
    for index, heading in enumerate(short):
        if heading:
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in cells(rows):
        table.add_row(*(cell for cell, heading in zip(line, short, strict=True) if heading))
    return table


def reference(rows: list[Row]) -> str:
    """What the numbers are to be read against."""
    entropy = rows[0]["unigram_entropy"]
    seeds = len({row["seed"] for row in rows})
    mean_of = f"Means over {seeds} seeds, ± standard deviation. " if seeds > 1 else ""
    return (
        f"{mean_of}Kept: for backward, of one micro-batch of {rows[0]['kept_tokens']:,} tokens. "
        f"Without context a model reaches a loss of {entropy:.3f} at best (unigram entropy)."
    )
