r"""The tables and the figure of docs/methods.md, from what `prac compare` measured.

    prac compare --turns 10 --out runs/compare --json benchmarks/results/compare.json
    prac compare --turns 10 --seed 0 --out runs/more --json benchmarks/results/compare-more.json --methods plain,\
        compile,lean+checkpoint2,lean+attention8,co-compression-rp,one-shot,plain+adam-mini,lean+adam-mini
    python benchmarks/adapters.py --seed 0 --turns 5
    python benchmarks/methods.py

Rewrites the part of docs/methods.md between its two marks, and draws `results/compare.svg`, of the first of these.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prac.lab.report import noise, overview, plots, results, table
from prac.runtime import files

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "methods.md"
START, END = "<!-- measured: written by benchmarks/methods.py -->", "<!-- end of measured -->"


def side_by_side(rows: list[results.Row], *names: str) -> str:
    """The table in Markdown, and what it was made by."""
    first, base = rows[0], results.baseline(rows)
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"| method | val loss | − {base} | kept | peak of a step | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    points = overview.against_baseline(rows)
    for it in table.cells(rows):
        time = points[it.method]["time"]
        lines.append(f"| `{it.method}` | {it.loss} | {it.above} | {it.kept} | {it.peak} | {time:.2f}× |")
    tokens = first["tokens"] // first["steps"]
    links = ", ".join(f"[JSON](../benchmarks/results/{name}.json)" for name in names)
    lines += [
        "",
        f"{Path(first['model']).name}, {first['parameters'] / 1e6:.1f}M parameters, {first['steps']} steps of "
        f"{tokens:,} tokens on {Path(first['data']).name}, {seeds} seed{'s' if seeds > 1 else ''} ({links})."
        f"{' ' + noise.remark() if table.single(rows) else ''}",
    ]
    return "\n".join(lines)


def measured(compared: list[results.Row], more: list[results.Row], adapters: list[results.Row]) -> str:
    """All that is measured, and the paper's ordering against it; ``more`` and ``adapters`` may be missing."""
    grouped = results.by_method(compared)
    names = ("compare", "compare-more") if more else ("compare",)
    parts = [
        side_by_side(compared + [row for row in more if row["method"] not in grouped], *names),
        "± is the standard deviation over seeds, of the differences seed by seed in the third column. Peak: weights, "
        "gradients, optimizer state, what is kept and temporaries. Time per token, plain = 1.",
        "\n".join(f"- {claim}" for claim in ordering(grouped)),
        "![Peak memory against time, coloured by loss](../benchmarks/results/compare.svg)",
    ]
    if adapters:
        parts += ["Adapters on a pretrained model, by `benchmarks/adapters.py`:", side_by_side(adapters, "adapters")]
    return "\n\n".join(parts)


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
    parser.parse_args()
    paths = [HERE / "results" / f"{name}.json" for name in ("compare", "compare-more", "adapters")]
    compared, more, adapters = (results.read(path)["rows"] if path.exists() else [] for path in paths)
    files.write(HERE / "results" / "compare.svg", plots.on_white(overview.frontier(compared)))
    page = PAGE.read_text()
    before, rest = page.split(START)
    _, after = rest.split(END)
    files.write(PAGE, f"{before}{START}\n{measured(compared, more, adapters)}\n{END}{after}")


if __name__ == "__main__":
    main()
