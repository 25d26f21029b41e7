"""Figure 7: the scale k of the random part, in linear layers and in norms.

    python benchmarks/paper/figure7.py                 # every run, then the figure; goes on where it stopped
    python benchmarks/paper/figure7.py --steps 260     # the length of the other figures, in twice the time

k = 0.2, 0.5 and 1.2 times the unbiased k0 = (n − r1) / r2 in one kind of layers, and k0 in all others. The paper says
that k0 is best in both.
"""

from __future__ import annotations

import common
from claims import Gap, below

from prac.config import Rank
from prac.presets import PRESETS

FACTORS = (0.2, 0.5, 1.2)
KINDS = ("linear", "norm")


def settings() -> dict[str, list[str]]:
    """The options of `prac train` by setting; k0 is the preset as it is."""
    found = {"paper": ["--method", "paper"]}
    for kind in KINDS:
        rank = getattr(PRESETS["paper"], kind)
        assert isinstance(rank, Rank)
        for factor in FACTORS:
            found[f"paper-{kind}-k{factor}"] = ["--method", "paper", f"--{kind}", f"{rank.r1},{rank.r2},{factor}"]
    return found


def main() -> None:
    arguments = common.parse(common.trainer(__doc__, steps=130))
    runs = common.train(common.jobs(arguments, settings()), common.place(arguments), arguments.workers)
    rows = common.rows_of(runs)
    losses = common.by_seed(rows)
    claims = [
        below(f"k0 below {factor} k0 in {kind} layers", losses, "paper", f"paper-{kind}-k{factor}")
        for kind in KINDS
        for factor in FACTORS
    ]
    table = common.table(common.title(arguments), "k", "loss", "− k0", "seeds")
    for setting, found in losses.items():
        gap = Gap.between(found, losses.get("paper", {}))
        name = "k0" if setting == "paper" else setting.removeprefix("paper-").replace("-k", ": ") + " k0"
        table.add_row(
            name, common.plus_minus(found.values()), "–" if gap is None else f"{gap.mean:+.3f}", str(len(found))
        )
    common.save(
        "figure7", arguments.out, rows, claims=claims, table=table,
        paper="k = k0 converges best, for linear layers and for norms (curves without numbers, LLaMA-130M)",
        ours=", ".join(f"{s.removeprefix('paper-') if s != 'paper' else 'k0'} {common.plus_minus(v.values())}"
                       for s, v in losses.items()),
        figure=lambda: common.curves(runs, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
