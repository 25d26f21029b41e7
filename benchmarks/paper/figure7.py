"""Figure 7: the scale k of the random part, in linear layers and in norms.

    python benchmarks/paper/figure7.py                 # every run, then the figure; goes on where it stopped
    python benchmarks/paper/figure7.py --steps 260     # the length of the other figures, in twice the time

k = 0.2, 0.5 and 1.2 times the unbiased k0 = (n − r1) / r2 in one kind of layers, and k0 in all others. The paper says
that k0 is best in both.
"""

from __future__ import annotations

from collections.abc import Mapping

import common
from claims import Gap, below
from matplotlib.figure import Figure

from prac.config import Rank
from prac.lab.report import results
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


def draw(runs: Mapping[str, common.Run], title: str) -> Figure:
    """Loss less that of k0 with the same seed, by step: what seeds share would hide the differences otherwise."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    losses = {
        setting: {run["seed"]: results.validation(run) for run in group}
        for setting, group in common.by_setting(runs).items()
    }
    base = losses.get("paper", {})
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for index, factor in enumerate(FACTORS):
            found = losses.get(f"paper-{kind}-k{factor}", {})
            pairs = [(curve, base[seed]) for seed, curve in found.items() if seed in base]
            steps = [step for step in pairs[0][0] if all(step in a and step in b for a, b in pairs)] if pairs else []
            values = [[a[step] - b[step] for a, b in pairs] for step in steps]
            common.line(axes, steps, values, f"k = {factor} k0", index + 1)
        axes.axhline(0, color=common.COLOURS[0], linewidth=0.8)
        axes.set(xlabel="optimizer step", title=f"{kind} layers")
        axes.legend(fontsize=8.5)
    figure.get_axes()[0].set_ylabel("validation loss less that of k0")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


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
        figure=lambda: draw(runs, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
