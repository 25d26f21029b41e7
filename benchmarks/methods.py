"""The table and the figure of docs/methods.md, from what `prac compare` measured.

    prac compare --json benchmarks/results/compare.json
    python benchmarks/methods.py

Rewrites the part of docs/methods.md between its two marks, and draws `results/compare.svg`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from prac import files
from prac.lab import overview, plots, results, table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "methods.md"
START, END = "<!-- measured: written by benchmarks/methods.py -->", "<!-- end of measured -->"


def measured(rows: list[results.Row], name: str) -> str:
    """The table in Markdown, what it was made by, and the paper's ordering against it."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    lines = ["| method | val loss | − plain | kept | peak of a step | time |", "| --- | --- | --- | --- | --- | --- |"]
    grouped = results.by_method(rows)
    for cells, (method, runs) in zip(table.cells(rows), grouped.items(), strict=True):
        time = overview.point(runs, grouped["plain"])["time"]
        lines.append(f"| `{method}` | {cells[1]} | {cells[2]} | {cells[4]} | {cells[6]} | {time:.2f}× |")
    tokens = first["tokens"] // first["steps"]
    lines += [
        "",
        f"{first['model']}, {first['steps']} steps of {tokens:,} tokens on {first['data']}, {seeds} seeds; ± is the "
        f"standard deviation, of the differences seed by seed in the third column "
        f"([JSON](../benchmarks/results/{name}.json)). Peak: weights, gradients, optimizer state, what is kept and "
        "temporaries. Time per token, plain = 1.",
        "",
        *(f"- {claim}" for claim in ordering(grouped)),
        "",
        f"![Peak memory against time, coloured by loss](../benchmarks/results/{name}.svg)",
    ]
    return "\n".join(lines)


def ordering(grouped: dict[str, list[results.Row]]) -> list[str]:
    """The paper's claim, PRAC below GaLore and RSO in loss at less memory, as these runs have it."""
    found = []
    for ours in ("paper", "lean"):
        for theirs in ("galore", "rso"):
            if ours in grouped and theirs in grouped:
                gaps = table.above(grouped[ours], grouped[theirs])
                memory = results.mean(grouped[ours], "kept_bytes") / results.mean(grouped[theirs], "kept_bytes")
                found.append(f"`{ours}` against `{theirs}`: {verdict(gaps)}, keeping {memory:.0%} of what it keeps.")
    return found


def verdict(gaps: list[float]) -> str:
    """A difference of losses by seed in words: seen where zero is outside of its 95% interval."""
    mean, spread = results.summary(gaps)
    size = f"{mean:+.3f} ± {spread:.3f} nats".replace("-", "−")
    if abs(mean) <= results.half_width(gaps):
        return f"{size}, which is within the noise"
    return f"{size}, a {'higher' if mean > 0 else 'lower'} loss on average than the noise explains"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="compare", help="of the JSON in benchmarks/results (default: compare)")
    arguments = parser.parse_args()
    rows = results.read(HERE / "results" / f"{arguments.name}.json")["rows"]
    with matplotlib.rc_context(plots.STYLE):
        files.write(HERE / "results" / f"{arguments.name}.svg", plots.on_white(overview.frontier(rows)))
    page = PAGE.read_text()
    before, rest = page.split(START)
    _, after = rest.split(END)
    files.write(PAGE, f"{before}{START}\n{measured(rows, arguments.name)}\n{END}{after}")


if __name__ == "__main__":
    main()
