"""Figure 5: PRAC against its two limits at the same total rank, and against plain training.

    python benchmarks/paper/figure5.py                 # every run, then the figure; goes on where it stopped
    python benchmarks/paper/figure5.py --scales 1 0.5  # once more with half of the ranks

Three seeds of each method train `llama-tiny` on the State of the Union speeches with the ranks of the presets times
each scale: 0.6n for linear layers, 0.4n for norms and activation functions, n being the hidden size for these. The
paper's figure has a lower rank for PRAC and PAC, and says that RAC diverges there. In activation functions `paper` is
PAC.
"""

from __future__ import annotations

from dataclasses import replace

import common
from claims import Claim, Gap, below

from prac.config import Rank
from prac.lab.report import results
from prac.presets import PRESETS

KINDS = ("linear", "norm", "activation")
METHODS = ("paper", "pac", "rac")
TOLERANCE = 0.01  # nats, as in figure3.py


def ranks(method: str, scale: float) -> list[str]:
    """The method's ranks times ``scale``, as command-line options."""
    arguments = []
    for kind in KINDS if scale != 1 else ():
        rank: Rank = getattr(PRESETS[method], kind)
        arguments += [f"--{kind}", str(replace(rank, r1=round(scale * rank.r1, 3), r2=round(scale * rank.r2, 3)))]
    return arguments


def name(method: str, scale: float) -> str:
    """Of a setting; with the presets' own ranks it is just the method, as in other scripts."""
    return method if scale == 1 or method == "plain" else f"{method}-{scale:g}"


def claims(rows: list[results.Row], scales: list[float]) -> list[Claim]:
    """What the paper says of the figure, for each scale of the ranks."""
    losses = common.by_seed(rows)
    found = []
    for scale in scales:
        prac, pac, rac = (name(method, scale) for method in METHODS)
        where = "" if scale == 1 else f" at {scale:g} of the ranks"
        found += [
            below(f"PRAC below PAC{where}", losses, prac, pac),
            below(f"PRAC below RAC{where}", losses, prac, rac),
            below(f"PRAC at most 0.01 nats above plain{where}", losses, prac, "plain", TOLERANCE),
        ]
    return found


PAPER = "PRAC converges faster than PAC late and than RAC throughout; RAC diverges at r = 0.3 (curves without numbers)"


def ours(rows: list[results.Row]) -> str:
    """The last loss of every setting."""
    return ", ".join(f"{s} {common.plus_minus(v.values())}" for s, v in common.by_seed(rows).items())


def main() -> None:
    # Longer than the others: PAC is said to fall behind late.
    parser = common.trainer(__doc__, steps=480, batch_size=8)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the presets' ranks (default: 1)")
    arguments = common.parse(parser)
    settings = {"plain": ["--method", "plain"]} | {
        name(method, scale): ["--method", method, *ranks(method, scale)]
        for scale in arguments.scales
        for method in METHODS
    }
    runs = common.train(common.jobs(arguments, settings), common.place(arguments), arguments.workers)
    rows = common.rows_of(runs)
    table = common.table(common.title(arguments), "setting", "loss", "− plain", "seeds")
    losses = common.by_seed(rows)
    for setting, found in losses.items():
        gap = Gap.between(found, losses.get("plain", {}))
        table.add_row(
            setting, common.plus_minus(found.values()), "–" if gap is None else f"{gap.mean:+.3f}", str(len(found))
        )
    common.save(
        "figure5", arguments.out, rows, claims=claims(rows, arguments.scales), table=table, paper=PAPER,
        ours=ours(rows), figure=lambda: common.curves(runs, common.title(arguments)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
