r"""Table 9 and Figure 6: PRAC with Muon and with Adam-mini.

    python benchmarks/paper/table9.py                  # every run, then the table; goes on where it stopped
    python benchmarks/paper/table9.py --model llama-130m --data allenai/c4:en --tokenizer t5-base --steps 20000 \
        --batch-size 128 --max-tokens 2600000000 --bf16 --workers 1       # as the paper

Memory is what autograd keeps for one micro-batch, which the optimizer does not change; the peak of a step, with
weights and optimizer, is in the JSON. `table2.py` predicts the peaks of the paper's models with both optimizers.
`torch.optim.Muon` orthogonalises in bf16, which takes most of a step on a processor without instructions for it:
hence half the steps of the other scripts.
"""

from __future__ import annotations

import math

import common
from claims import Claim, Gap

OPTIMIZERS = ("muon", "adam-mini")
METHODS = [f"{method}+{optimizer}" for optimizer in OPTIMIZERS for method in ("plain", "paper")]
# Perplexity and peak memory in GB of LLaMA-130M, without PRAC and with it.
PAPER = {"muon": ((23.90, 24.16), (21.04, 15.37)), "adam-mini": ((24.22, 24.48), (21.01, 15.36))}
PAPER_350M = {"muon": ((17.98, 18.04), (45.26, 30.82)), "adam-mini": ((18.60, 18.92), (45.42, 31.09))}
# The most that PRAC costs in the paper: 1.7% of perplexity (Adam-mini, 350M). "Negligible" is taken as 2%.
TOLERANCE = math.log(1.02)


def pairs(methods: list[str]) -> list[tuple[str, str]]:
    """Each optimizer's plain method and its compressed ones."""
    suffix = {method: method.partition("+")[2] for method in methods}
    return [
        (plain, method)
        for plain in methods if plain.startswith("plain")
        for method in methods if method != plain and suffix[method] == suffix[plain]
    ]  # fmt: skip


def main() -> None:
    arguments = common.parse(common.trainer(__doc__, methods=METHODS, steps=130))
    settings = {method: ["--method", method] for method in arguments.methods}
    runs = common.train(common.jobs(arguments, settings), common.place(arguments), arguments.workers)
    rows = common.rows_of(runs)
    losses, perplexities, kept = (common.by_seed(rows, key) for key in ("val_loss", "val_ppl", "kept_bytes"))
    published = PAPER_350M if arguments.model == "llama-350m" else PAPER

    claims, said = [], []
    table = common.table(
        common.title(arguments), "method", "loss", "perplexity", "more", "kept MiB", "less", "the paper's", "seeds"
    )
    partner = {compressed: plain for plain, compressed in pairs(arguments.methods)}
    for method, found in losses.items():
        plain = partner.get(method)
        optimizer = method.partition("+")[2]
        more = less = theirs = "–"
        if plain in losses and (gap := Gap.between(found, losses[plain])) is not None:
            saved = 1 - next(iter(kept[method].values())) / next(iter(kept[plain].values()))
            more, less = f"{math.expm1(gap.mean):+.1%}", f"{saved:.0%}"
            said.append(f"{method} perplexity {more}, {less} less kept")
            claims.append(Claim(f"{method} raises perplexity by less than 2%", gap, TOLERANCE))
            # That the whole peak falls by 27% takes at least as much of what is kept.
            claims.append(Claim(f"{method} keeps at least 27% less", Gap.exact(0.27 - saved), unit="{:+.2f}"))
        elif plain is not None:
            claims.append(Claim(f"{method} raises perplexity by less than 2%", None, TOLERANCE))
        if optimizer in published and plain is not None:
            (p0, p1), (m0, m1) = published[optimizer]
            theirs = f"{p1 / p0 - 1:+.1%}, {1 - m1 / m0:.0%} less"
        table.add_row(
            method, common.plus_minus(found.values()), common.plus_minus(perplexities[method].values(), 1), more,
            f"{next(iter(kept[method].values())) / 2**20:.1f}", less, theirs, str(len(found)),
        )  # fmt: skip
    for plain, compressed in pairs(arguments.methods):
        if compressed not in losses:
            claims.append(Claim(f"{compressed} raises perplexity by less than 2% over {plain}", None, TOLERANCE))
    common.save(
        "table9", arguments.out, rows, claims=claims, table=table,
        paper="perplexity and peak memory: " + ", ".join(
            f"{optimizer} {p1 / p0 - 1:+.1%} and {m1 / m0 - 1:+.0%}"
            for optimizer, ((p0, p1), (m0, m1)) in published.items()
        ),
        ours="; ".join(said) or "no pair of runs came through",
        figure=lambda: common.curves(runs, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
