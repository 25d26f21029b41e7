r"""The losses of Table 2: plain training, GaLore, RSO and PRAC, and `lean` beside them.

    python benchmarks/paper/table2_loss.py             # every run, then the table; goes on where it stopped
    python benchmarks/paper/table2_loss.py --model llama-130m --data allenai/c4:en --tokenizer t5-base --steps 20000 \
        --batch-size 128 --max-tokens 2600000000 --bf16 --workers 1       # as the paper

What carries over from the paper's scale to a small one, if anything, is by how much a method raises plain training's
perplexity. `table2.py` has the memory.
"""

from __future__ import annotations

import math

import common
from claims import Gap, below
from matplotlib.figure import Figure

METHODS = ["plain", "galore", "rso", "paper", "lean"]
TOLERANCE = math.log(1.01)  # the paper's PRAC raises perplexity by 0.5% to 1.0%


def increase(model: str, method: str) -> float | None:
    """By how much the paper's perplexity is above plain training's."""
    theirs = common.PERPLEXITY[model].get(method)
    return None if theirs is None else theirs / common.PERPLEXITY[model]["plain"] - 1


def main() -> None:
    arguments = common.parse(common.trainer(__doc__, methods=METHODS))
    settings = {method: ["--method", method] for method in arguments.methods}
    runs = common.train(common.jobs(arguments, settings), common.place(arguments), arguments.workers)
    rows = common.rows_of(runs)
    losses, perplexities = common.by_seed(rows), common.by_seed(rows, "val_ppl")
    kept = {setting: next(iter(found.values())) for setting, found in common.by_seed(rows, "kept_bytes").items()}
    plain = losses.get("plain", {})
    reference = arguments.model if arguments.model in common.PERPLEXITY else "llama-130m"

    claims = [below("paper raises perplexity by less than 1%", losses, "paper", "plain", TOLERANCE)]
    claims += [below(f"paper below {method}", losses, "paper", method) for method in ("galore", "rso")]
    if "lean" in losses:
        claims.append(below("lean, not in the paper, by less than 1%", losses, "lean", "plain", TOLERANCE))

    columns = ("method", "loss", "perplexity", "more", f"the paper's ({reference})", "kept MiB", "less", "seeds")
    table = common.table(common.title(arguments), *columns)
    more: dict[str, str] = {}
    for method, found in losses.items():
        gap, theirs = Gap.between(found, plain), increase(reference, method)
        # Seed by seed, then averaged: e^(loss − plain's) − 1.
        ratios = [100 * math.expm1(found[seed] - plain[seed]) for seed in found if seed in plain]
        more[method] = "–" if gap is None or method == "plain" else common.plus_minus(ratios, 1) + "%"
        table.add_row(
            method, common.plus_minus(found.values()), common.plus_minus(perplexities[method].values(), 1),
            more[method], "–" if not theirs else f"{theirs:+.1%}", f"{kept[method] / 2**20:.1f}",
            f"{kept['plain'] / kept[method]:.2f}×" if "plain" in kept else "–", str(len(found)),
        )  # fmt: skip

    def draw() -> Figure:
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        compared = [method for method in losses if method != "plain" and plain]
        for place, method in enumerate(compared):
            each = [100 * math.expm1(losses[method][s] - plain[s]) for s in losses[method] if s in plain]
            axes.plot(
                [place - 0.1] * len(each),
                each,
                "o",
                color=common.COLOURS[1],
                label="" if place else "ours, a seed each",
            )
            if (theirs := increase(reference, method)) is not None:
                axes.plot(
                    [place + 0.1], [100 * theirs], "D", color=common.COLOURS[2], label="" if place else "the paper"
                )
        axes.axhline(0, color="#888888", linewidth=0.6)
        axes.set_xticks(range(len(compared)), compared)
        axes.set(ylabel="perplexity above plain training (%)", title=common.title(arguments))
        axes.title.set_fontsize(8.5)
        axes.legend(fontsize=8.5)
        return figure

    theirs = ", ".join(f"{m} {increase(reference, m):+.1%}" for m in ("galore", "rso", "paper"))
    common.save(
        "table2_loss", arguments.out, rows, claims=claims, table=table, figure=draw,
        paper=f"perplexity against plain training's: {theirs} ({reference})",
        ours=", ".join(f"{m} {text}" for m, text in more.items() if m != "plain") or "no plain runs to compare with",
        kept=kept,
    )  # fmt: skip


if __name__ == "__main__":
    main()
