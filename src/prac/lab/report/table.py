"""The table of methods side by side, as text cells for the terminal and the report alike."""

from __future__ import annotations

from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prac.lab.report import noise
from prac.lab.report.results import Row, baseline, by_method, mean, summary
from prac.runtime.text import size


class Line(NamedTuple):
    """The cells of one method, what decides first: a terminal or a phone has room for those before ``less``."""

    method: str
    loss: str
    above: str
    kept: str
    peak: str
    speed: str
    less: str
    perplexity: str
    tokens_per_s: str


ROOM = Line._fields.index("less")


def headings(rows: list[Row]) -> Line:
    """Of the columns of :func:`cells`."""
    plain = baseline(rows) or "plain"
    return Line(
        "method", "val loss", f"above {plain}", "kept for backward", "peak memory", "speed", "less kept", "perplexity",
        "tokens/s",
    )  # fmt: skip


def cells(rows: list[Row]) -> list[Line]:
    """One line per method under :func:`headings`, means over its seeds; ± is their standard deviation.

    What is "above plain", or another baseline, is the mean of the differences seed by seed, which share weights and
    data, and its own deviation; of a single seed, what :mod:`prac.lab.report.noise` has for it, in brackets.
    """
    grouped = by_method(rows)
    base = baseline(rows)
    plain = grouped[base] if base else None
    lines: list[Line] = []
    for method, runs in grouped.items():
        gaps = above(runs, plain or [])
        lines.append(
            Line(
                method=method,
                loss=spread([row["val_loss"] for row in runs], ".3f"),
                above=noise.difference(gaps) if gaps and method != base else "–",
                kept=size(mean(runs, "kept_bytes")),
                peak=size(mean(runs, "peak_bytes")),
                speed=f"{mean(runs, 'tokens_per_s') / mean(plain, 'tokens_per_s'):.2f}×" if plain else "–",
                less=f"{mean(plain, 'kept_bytes') / mean(runs, 'kept_bytes'):.2f}×" if plain else "–",
                perplexity=f"{mean(runs, 'val_ppl'):.1f}",
                tokens_per_s=f"{mean(runs, 'tokens_per_s'):,.0f}",
            )
        )
    return lines


def above(runs: list[Row], plain: list[Row]) -> list[float]:
    """Validation losses less plain's of the same seed."""
    losses = {row["seed"]: row["val_loss"] for row in plain}
    return [row["val_loss"] - losses[row["seed"]] for row in runs if row["seed"] in losses]


def single(rows: list[Row]) -> bool:
    """Whether some method has but one seed to be compared by."""
    grouped, base = by_method(rows), baseline(rows)
    others = [runs for method, runs in grouped.items() if method != base]
    return base is not None and any(len(above(runs, grouped[base])) == 1 for runs in others)


def spread(values: list[float], form: str) -> str:
    """Their mean in a format such as ``+.3f``, ± their standard deviation; one alone has none."""
    centre, deviation = summary(values)
    return f"{centre:{form}} ± {deviation:{form.removeprefix('+')}}" if len(values) > 1 else f"{centre:{form}}"


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
    for index, heading in enumerate(("method", "val loss", f"− {plain}", "kept", "peak", "speed")):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in cells(rows):
        table.add_row(*line[:ROOM])
    return table


def reference(rows: list[Row]) -> str:
    """What the numbers are to be read against."""
    entropy = rows[0]["unigram_entropy"]
    seeds = len({row["seed"] for row in rows})
    notes = [
        f"Means over {seeds} seeds, ± standard deviation." if seeds > 1 else "",
        noise.remark() if single(rows) else "",
        f"Kept: for backward, of one micro-batch of {rows[0]['kept_tokens']:,} tokens.",
        f"Without context a model reaches a loss of {entropy:.3f} at best (unigram entropy).",
    ]
    return " ".join(note for note in notes if note)
