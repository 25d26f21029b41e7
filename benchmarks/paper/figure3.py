r"""Figure 3: validation loss by step, plain training, PRAC, GaLore and RSO.

    python benchmarks/paper/figure3.py                 # every run, then the figure; goes on where it stopped
    python benchmarks/paper/figure3.py --model llama-130m --data allenai/c4:en --tokenizer t5-base --steps 20000 \
        --batch-size 128 --max-tokens 2600000000 --bf16 --workers 1       # as the paper

The paper says that PRAC keeps up with plain training all the way, GaLore stagnates late for its bias, and RSO is slow
early for its variance. Compared are the last losses, and RSO's at 30% of the steps.
"""

from __future__ import annotations

import common
from claims import Gap, below

METHODS = ["plain", "paper", "galore", "rso"]
TOLERANCE = 0.01  # nats, 1% of perplexity: that of the paper's Table 2 for LLaMA-130M
EARLY = 0.3


def early(run: common.Run) -> float:
    """The first validation loss at or after 30% of the steps."""
    points = [(line["step"], line["val_loss"]) for line in run["metrics"] if "val_loss" in line]
    return next(loss for step, loss in points if step >= EARLY * points[-1][0])


def main() -> None:
    arguments = common.parse(common.trainer(__doc__, methods=METHODS))
    settings = {method: ["--method", method] for method in arguments.methods}
    runs = common.train(common.jobs(arguments, settings), common.place(arguments), arguments.workers)
    rows = [row | {"early_loss": early(runs[name])} for name, row in zip(runs, common.rows_of(runs), strict=True)]
    last, first = common.by_seed(rows), common.by_seed(rows, "early_loss")

    claims = [
        below("PRAC at most 0.01 nats above plain", last, "paper", "plain", TOLERANCE),
        *(below(f"PRAC below {method}", last, "paper", method) for method in ("galore", "rso")),
        below(f"PRAC below rso at {EARLY:.0%} of the steps", first, "paper", "rso"),
    ]

    table = common.table(common.title(arguments), "method", f"loss at {EARLY:.0%}", "last loss", "− plain", "seeds")
    for method in last:
        gap = Gap.between(last[method], last.get("plain", {}))
        table.add_row(
            method, common.plus_minus(first[method].values()), common.plus_minus(last[method].values()),
            "–" if gap is None else f"{gap.mean:+.3f}", str(len(last[method])),
        )  # fmt: skip
    order = sorted(last, key=lambda method: sum(last[method].values()) / len(last[method]))
    theirs = common.PERPLEXITY["llama-130m"]
    common.save(
        "figure3", arguments.out, rows, claims=claims, table=table,
        paper="plain < paper < galore < rso at the end (LLaMA-130M, perplexity "
        + ", ".join(f"{theirs[m]:.2f}" for m in METHODS) + ")",
        ours=" < ".join(order) + " (" + ", ".join(common.plus_minus(last[m].values()) for m in order) + ")",
        figure=lambda: common.curves(runs, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
