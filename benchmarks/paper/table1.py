"""Table 1: bias and variance of PAC, RAC and PRAC, measured on what a layer of a trained model reads.

    python benchmarks/paper/table1.py                  # trains three models, then draws; goes on where it stopped

Many subspaces of the same total rank are drawn for one activation X and its gradient, each by
`prac.estimators.subspace.Subspace` as in training. Of X̃, and of the weight's gradient dYᵀX̃ that it gives:

- bias: ‖E X̃ − X‖ / ‖X‖. Its square is estimated without bias from the inner products of the errors of different
  draws, with the jackknife's 95% interval. "Unbiased" is taken as: less than half of PAC's.
- variance: E‖X̃ − X‖² / ‖X‖², beside Theorem 7 (PRAC), Theorem 16 (RAC) and the tail of the spectrum (PAC). The
  gradient follows the same theorems with dYᵀX in the place of X, since the draw of Q2 knows neither.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from claims import Claim, Gap
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from prac.config import Rank
from prac.estimators.clock import Clock
from prac.estimators.subspace import Subspace
from prac.lab.measured import training
from prac.lab.report import results
from prac.lab.report.results import t95
from prac.lab.runs import checkpoints

METHODS = ("PAC", "RAC", "PRAC")
GROUPS = 20  # of draws, for the jackknife


def ranks(total: float) -> dict[str, Rank]:
    """The three methods at the same total rank."""
    return {"PAC": Rank(total, 0.0), "RAC": Rank(0.0, total), "PRAC": Rank(total / 2, total / 2)}


def activation(folder: Path, options: list[str], layer: str | None) -> tuple[str, Tensor, Tensor]:
    """The layer's name, its input X and its output's gradient dY, tokens × features, of a batch of validation text."""
    from transformers import AutoModelForCausalLM

    from prac.lab.runs import train

    checkpoint = checkpoints.newest(folder)
    if checkpoint is None:
        raise SystemExit(f"{folder} has no checkpoint: delete the folder and run this again.")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    _, blocks = train.prepare(common.options_of(options))
    batch = train.collate([blocks.validation[i] for i in range(min(len(blocks.validation), 16))])
    name = layer or training.middle_linear(model)
    caught: dict[str, Tensor] = {}

    def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        caught["x"] = inputs[0].detach()
        output.register_hook(lambda gradient: caught.update(dy=gradient))

    hook = model.get_submodule(name).register_forward_hook(catch)
    model(**batch).loss.backward()
    hook.remove()
    return name, *(caught[key].flatten(0, -2).double() for key in ("x", "dy"))


class Errors:
    """The errors of draw after draw of one quantity."""

    def __init__(self, exact: Tensor, draws: int) -> None:
        self.exact, self.each = exact, []
        self.sums = torch.zeros(min(GROUPS, draws), *exact.shape, dtype=exact.dtype)
        self.counts = [0] * len(self.sums)

    def add(self, estimate: Tensor) -> None:
        """Another draw."""
        error, group = estimate - self.exact, len(self.each) % len(self.sums)
        self.sums[group] += error
        self.counts[group] += 1
        self.each.append((error.square().sum() / self.exact.square().sum()).item())

    def variance(self) -> Gap:
        """E‖estimate − exact‖² / ‖exact‖²."""
        return Gap.of(self.each)

    def squared_bias(self) -> Gap:
        """‖E estimate − exact‖² / ‖exact‖²; may come out below zero where there is none."""
        means = (self.sums / torch.tensor(self.counts).view(-1, *[1] * self.exact.dim())).flatten(1)
        products = means @ means.T / self.exact.square().sum()
        own, groups = products.diagonal(), len(products)
        total, found = products.sum() - own.sum(), []
        for left_out in range(groups):
            rest = total - 2 * (products[left_out].sum() - own[left_out])
            found.append((rest / ((groups - 1) * (groups - 2))).item())
        error = math.sqrt((groups - 1) / groups * sum((f - statistics.fmean(found)) ** 2 for f in found))
        return Gap((total / (groups * (groups - 1))).item(), error, t95(groups - 1) * error)


def theory(exact: Tensor, q1: Tensor, n: int, r2: int) -> tuple[float, float]:
    """Squared bias and variance by the theorems, relative to ‖exact‖²."""
    tail = ((exact - exact @ q1 @ q1.T).square().sum() / exact.square().sum()).item()
    return (0.0, ((n - q1.shape[1]) / r2 - 1) * tail) if r2 else (tail, tail)


def monte_carlo(
    x: Tensor, dy: Tensor, rank: Rank, draws: int, progress: Callable[[range], Any] = iter
) -> dict[str, dict[str, Any]]:
    """Of X and of the weight's gradient: squared bias and variance, measured and by theory."""
    found = {"x": Errors(x, draws), "dw": Errors(dy.T @ x, draws)}
    model = nn.Linear(1, 1)  # for the clock, which holds it weakly
    for seed in progress(range(draws)):
        subspace = Subspace(rank, Clock(model), name="layer", seed=seed)
        kept = subspace.keep(x)
        found["x"].add(kept.reconstruct())
        found["dw"].add(kept.weight_grad(dy))
    assert subspace.p_NR is not None
    q1 = subspace.p_NR[:, : subspace.r1]
    measured: dict[str, dict[str, Any]] = {}
    for what, errors in found.items():
        bias, variance = theory(errors.exact, q1, x.shape[1], subspace.r2)
        measured[what] = {
            "squared_bias": vars(errors.squared_bias()), "squared_bias_theory": bias,
            "variance": vars(errors.variance()), "variance_theory": variance,
        }  # fmt: skip
    return measured


def bias(gap: dict[str, float]) -> str:
    """The bias, and the most that it may be."""
    return f"{math.sqrt(max(0.0, gap['mean'])):.2%} (≤ {math.sqrt(max(0.0, gap['mean'] + gap['half'])):.2%})"


def draw(rows: list[results.Row]) -> Figure:
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    for axes, what, name in zip(figure.subplots(1, 2), ("x", "dw"), ("X̃", "dYᵀX̃"), strict=True):
        for place, method in enumerate(METHODS):
            for row in (row for row in rows if row["method"] == method):
                axes.plot(place - 0.1, row[what]["variance"]["mean"], "o", color=common.COLOURS[1])
                axes.plot(place + 0.1, row[what]["variance_theory"], "D", color=common.COLOURS[2], markersize=4)
        axes.set_xticks(range(len(METHODS)), METHODS)
        axes.set(yscale="log", title=f"E‖error‖² / ‖·‖² of {name}")
        axes.plot([], [], "o", color=common.COLOURS[1], label="measured, a model each")
        axes.plot([], [], "D", color=common.COLOURS[2], markersize=4, label="theory")
    axes.legend(fontsize=8.5)
    return figure


def main() -> None:
    parser = common.trainer(__doc__)
    parser.add_argument("--rank", type=float, default=0.6, help="r1 + r2 as a share of the width (default: 0.6)")
    parser.add_argument("--draws", type=int, default=400, help="subspaces of each method (default: 400)")
    parser.add_argument("--layer", help="a linear layer (default: the first one of the middle block)")
    arguments = common.parse(parser)
    if arguments.draws < 4:
        parser.error("--draws must be at least 4")
    wanted = common.jobs(arguments, {"plain": ["--method", "plain"]})
    runs = common.train(wanted, common.place(arguments), arguments.workers)
    rows = []
    for name, run in runs.items():
        layer, x, dy = activation(common.place(arguments) / name, wanted[name], arguments.layer)
        for method, rank in ranks(arguments.rank).items():
            progress = lambda draws, title=f"{name} {method}": track(draws, description=title, transient=True)  # noqa: E731
            # Without random directions one draw is as the other.
            found = monte_carlo(x, dy, rank, arguments.draws if rank.r2 else 4, progress)
            rows.append({"method": method, "seed": run["row"]["seed"], "layer": layer, "tokens": len(x)} | found)

    def each(method: str, value: Callable[[dict[str, Any]], float], what: str = "x") -> list[float]:
        return [value(row[what]) for row in rows if row["method"] == method]

    def worst(method: str) -> Gap:
        """The squared bias of the model where it may be largest."""
        gaps = [Gap(**row["x"]["squared_bias"]) for row in rows if row["method"] == method]
        return max(gaps, key=lambda gap: gap.mean + gap.half)

    pac = min(each("PAC", lambda r: r["squared_bias"]["mean"]))
    off = {m: each(m, lambda r: abs(r["variance"]["mean"] / r["variance_theory"] - 1)) for m in METHODS}
    ratio = [
        math.log(a / b)
        for a, b in zip(*(each(m, lambda r: r["variance"]["mean"]) for m in ("PRAC", "RAC")), strict=True)
    ]
    claims = [
        Claim("PAC is biased, less its squared relative bias", Gap.exact(-pac), unit="{:+.4f}"),
        *(Claim(f"squared bias of {m} under a quarter of PAC's", worst(m), pac / 4, "{:+.6f}") for m in METHODS[1:]),
        Claim("variance of PRAC below that of RAC, as ln of the ratio", Gap.of(ratio), unit="{:+.2f}"),
        *(Claim(f"variance of {m} within 2% of the theorem", Gap.of(off[m]), 0.02, "{:+.4f}") for m in METHODS[1:]),
    ]  # fmt: skip
    heading = f"{rows[0]['layer']} of {common.title(arguments)}: {rows[0]['tokens']} tokens, rank {arguments.rank:g}n"
    table = common.table(f"{heading}, {arguments.draws} draws", "method", "of", "bias (at most)", "variance", "theory")
    for method in METHODS:
        for what, title in (("x", "X"), ("dw", "dW")):
            first = next(row[what] for row in rows if row["method"] == method)
            variance, predicted = (
                common.plus_minus(each(method, value, what), 4)
                for value in (lambda r: r["variance"]["mean"], lambda r: r["variance_theory"])
            )
            table.add_row(method, title, bias(first["squared_bias"]), variance, predicted)
    table.caption = f"Variance: mean ± deviation over the models; bias: of the model of seed {rows[0]['seed']}."
    common.save(
        "table1", arguments.out, rows, claims=claims, table=table, figure=lambda: draw(rows),
        paper="PAC biased; RAC unbiased, high variance; PRAC unbiased, minimum variance",
        ours="; ".join(
            f"{m}: bias {bias(next(r['x']['squared_bias'] for r in rows if r['method'] == m))}, variance "
            + common.plus_minus(each(m, lambda r: r["variance"]["mean"]), 4) for m in METHODS
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
