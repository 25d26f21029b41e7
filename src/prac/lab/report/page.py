"""A run, or several side by side, as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from prac.lab.report import noise, overview, plots, results, table
from prac.lab.runs import run_folder
from prac.monitoring import monitor
from prac.runtime import files
from prac.runtime.text import size


def read_run(folder: Path) -> dict[str, Any]:
    """What the figures need of one run folder, and its row."""
    result = results.read(folder / "result.json")
    row = result["rows"][0]
    spectra = folder / "spectrum.json"
    return {
        "method": row["method"],
        "seed": row["seed"],
        "row": row,
        "options": result["options"],
        "summary": result["summary"],
        "versions": result["versions"],
        "kept": result["kept_by_layer"],
        "metrics": results.read_lines(folder / "metrics.jsonl"),
        "spectra": results.read(spectra) if spectra.exists() else [],
        "layers": monitor.read(folder / run_folder.LAYERS),
    }


def headlines(rows: list[results.Row]) -> list[dict[str, Any]]:
    """What each method saved and what it cost against the baseline; without one, what it measured."""
    grouped, base = results.by_method(rows), results.baseline(rows)
    plain = grouped.pop(base) if base else None
    if plain is None or not grouped:
        runs = next(iter(grouped.values()), plain or [])
        facts = [
            (f"{results.mean(runs, 'val_loss'):.3f}", "validation loss"),
            (size(results.mean(runs, "kept_bytes")), "kept for backward"),
            (size(results.mean(runs, "peak_bytes")), "peak memory"),
            (f"{results.mean(runs, 'tokens_per_s'):,.0f}", "tokens per second"),
        ]
        return [{"method": runs[0]["method"], "facts": facts}]
    found = []
    for method, runs in grouped.items():
        ratio = {
            key: results.mean(runs, key) / results.mean(plain, key)
            for key in ("kept_bytes", "peak_bytes", "tokens_per_s")
        }
        facts = [
            (f"{1 / ratio['kept_bytes']:.2f}×", "less kept for backward"),
            (f"{ratio['peak_bytes'] - 1:+.0%}", "peak memory"),
            _loss(table.above(runs, plain)),
            (f"{ratio['tokens_per_s']:.2f}×", f"the speed of {base}"),
        ]
        found.append({"method": method, "facts": [(noise.signed(number), what) for number, what in facts]})
    return found


def _loss(gaps: list[float]) -> tuple[str, str]:
    """What a method costs in loss, beside how far that is known."""
    if not gaps:
        return "–", "validation loss: no seed in common"
    deviation, more = noise.deviation(gaps), math.expm1(statistics.fmean(gaps))
    known = f", ±\u00a0{deviation:.3f} over {len(gaps)} seeds"
    if len(gaps) == 1:
        known = f" of one seed; under about {2 * deviation:.2f} is noise"
    return noise.centre(gaps), f"validation loss{known} ({noise.signed(f'{more:+.1%}')} perplexity)"


def answers(rows: list[results.Row]) -> list[tuple[str, str]]:
    """Which method to take for what, as far as these runs can tell: a question and its answer each.

    :func:`prac.lab.report.overview.point` says when a loss is seen to be above the baseline's.
    """
    base, points = results.baseline(rows), overview.against_baseline(rows)
    harmless = {name: point for name, point in points.items() if point["harmless"]}
    no_slower = {name: point for name, point in harmless.items() if point["time"] <= 1.05}

    def told(name: str) -> str:
        point = points[name]
        if name == base:
            return f"{base} itself"
        return (
            f"{name}: {point['peak']:.0%} of {base}'s peak, {point['time']:.2f}× its time, {point['difference']} nats"
        )

    def least(found: dict[str, Any], what: str) -> str:
        return told(min(found, key=lambda name: found[name][what]))

    return [
        ("Least memory, no loss seen", least(harmless, "peak")),
        (f"Least memory at {base}'s speed, no loss seen", least(no_slower, "peak")),
        ("Least memory at all", least(points, "peak")),
        (f"Lowest loss beside {base}", least({n: p for n, p in points.items() if n != base}, "gap")),
    ]


def render(folders: Sequence[Path], argv: Sequence[str]) -> str:
    """The page for one or more complete run folders; ``argv`` is the command that made them."""
    runs = [read_run(folder) for folder in folders]
    rows = results.against_plain([run["row"] for run in runs])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prac.lab.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    first = {method: group[0] for method, group in results.by_method(runs).items()}
    common, own = _options(runs)
    base = results.baseline(rows)
    many = base is not None and len(overview.against_baseline(rows)) >= overview.MANY
    # With many methods, a page for each run has these.
    measured = {} if many else {method: run for method, run in first.items() if run["layers"]}
    return environment.get_template("report.html.j2").render(
        rows=rows,
        headlines=[] if many else headlines(rows),
        baseline=base if len(first) > 1 else None,
        colours=plots.COLOURS,
        headings=table.headings(rows),
        lines=table.cells(rows),
        room=table.ROOM,
        reference=table.reference(rows),
        many=many,
        answers=answers(rows) if many else [],
        frontier=overview.frontier(rows) if many else None,
        gaps=overview.gaps(runs) if many else None,
        losses=plots.losses(runs, rows[0]["unigram_entropy"]),
        kept=overview.kept(runs) if many else plots.kept(runs),
        spectra=plots.spectra(runs) if all(run["spectra"] for run in runs) and not many else None,
        layers={method: plots.layers(run["layers"], method) for method, run in measured.items()},
        readings={method: run["layers"][-1].table() for method, run in first.items() if run["layers"]},
        summaries={method: first[method]["summary"] for method in first if first[method]["summary"]},
        common=common,
        own=own,
        versions=runs[0]["versions"],
        command=shlex.join(["prac", *argv]),
    )


def write(folders: Sequence[Path], argv: Sequence[str], path: Path) -> None:
    """Write the page for ``folders`` to ``path``."""
    files.write(path, render(folders, argv))


def _options(runs: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Options that all runs share, and the config of each method."""
    shared = dict(runs[0]["options"])
    for name in ("method", "seed", "config"):
        shared.pop(name)
    shared["seed"] = sorted({run["seed"] for run in runs})
    common = {name: _text(value) for name, value in shared.items() if value is not None}
    own = {run["method"]: _text(run["options"]["config"]) for run in runs if run["options"]["config"] is not None}
    return common, own


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)
