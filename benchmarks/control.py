"""A control for GaLore's row: plain AdamW with a smaller learning rate for the matrices that GaLore projects.

    python benchmarks/control.py                       # every run, then the table; goes on where it stopped

An update in a quarter of the directions is half as long as AdamW's, whatever the directions are, while embedding
and head learn as ever. Here the matrices of the blocks get AdamW's update times 1, 1/2 and 1/4, in plain training
and, times 1/4, with PRAC. What of GaLore's difference to plain training remains beside these is due to its
directions, and PRAC with shorter steps is what GaLore can be compared with. Writes `results/control.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from prac.lab.methods.optimizers import is_matrix_of_a_block
from prac.lab.report import results
from prac.lab.report.table import above, spread
from prac.lab.runs import train
from prac.lab.runs.options import options

HERE = Path(__file__).parent / "results"


class SlowBlocks(TrainerCallback):
    """Gives the matrices of blocks a parameter group of their own, with a share of the learning rate."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        """Split the group, once there are an optimizer and a schedule."""
        inside = [p for name, p in model.named_parameters() if is_matrix_of_a_block(name, p)]
        chosen = {id(p) for p in inside}
        optimizer = getattr(optimizer, "optimizer", optimizer)
        decayed = optimizer.param_groups[0]
        decayed["params"] = [p for p in decayed["params"] if id(p) not in chosen]
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        rest = {name: value for name, value in decayed.items() if name != "params"}
        optimizer.add_param_group(rest | {"params": inside, "lr": self.share * decayed["lr"]})
        scheduler.base_lrs.append(self.share * scheduler.base_lrs[0])
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="in plain training")
    parser.add_argument("--methods", nargs="+", default=["paper", "lean"], help="with the last share too")
    parser.add_argument("--runs", type=Path, default=Path("runs/control"), help="run folders go here")
    parser.add_argument("--compare", type=Path, default=HERE / "compare.json", help="what prac compare measured")
    arguments = parser.parse_args()

    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    settings = [("plain", share) for share in arguments.shares]
    settings += [(method, arguments.shares[-1]) for method in arguments.methods]
    rows = []
    for seed in arguments.seeds:
        for method, share in settings:
            out = arguments.runs / f"{method}-blocks-{share:g}-seed{seed}"
            row = train.run(
                options(method, seed, save_every=0, **steps), out, resume=True, callbacks=[SlowBlocks(share)]
            )
            rows.append(row | {"method": f"{method}, blocks × {share:g}", "share": share})
    others = results.read(arguments.compare)["rows"] if arguments.compare.exists() else []
    shown = results.by_method(rows + [row for row in others if row["method"] in ("galore", "rso", "compact")])

    plain = next(iter(shown.values()))
    references = {"− plain": plain} | ({"− galore": shown["galore"]} if "galore" in shown else {})
    table = Table(title=f"{rows[0]['model']}, {rows[0]['steps']} steps: validation loss, and differences of each seed")
    for heading in ("setting", "val loss", *references):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, group in shown.items():
        gaps = [spread(above(group, reference), "+.3f") for reference in references.values()]
        table.add_row(name, spread([row["val_loss"] for row in group], ".3f"), *gaps)
    results.write(HERE / "control.json", "benchmarks/control.py", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
