r"""Figure 4: loss against model size, with and without compression, and the power law through it.

    python benchmarks/paper/figure4.py                 # every run, then the figure; goes on where it stopped
    python benchmarks/paper/figure4.py --sizes llama-64x2 llama-96x3 llama-128x4 llama-192x4    # four times as long
    python benchmarks/paper/figure4.py --sizes llama-35m llama-60m llama-130m llama-350m --ratio 20 --batch-size 128 \
        --data allenai/c4:en --tokenizer t5-base --max-tokens 7400000000 --bf16 --workers 1      # as the paper

Every size is trained on as many tokens for each of its parameters. The paper has 20; the default is 2, and four sizes
of 0.1 to 1 million parameters with a vocabulary of 1,024, since that is what two cores can do in an hour: far from
where models stop to gain from more text, so the exponent is not the paper's. What can be compared is the exponent with
and without compression. L = a N^-b is fitted to the logarithms, without a floor; so few points over one decade cannot
tell a law with a floor from one without.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import common
import torch
from claims import Claim, Gap
from matplotlib.figure import Figure

from prac.lab.materials import models
from prac.lab.report.results import t95

SIZES = ["llama-32x2", "llama-64x2", "llama-96x3", "llama-128x4"]
METHODS = ["plain", "paper", "lean"]


@dataclass(frozen=True)
class PowerLaw:
    """L = a N^-b by least squares on the logarithms; ``error`` is the standard error of b."""

    a: float
    b: float
    error: float
    freedom: int

    def gap(self) -> Gap:
        """The exponent with its 95% interval."""
        return Gap(self.b, self.error, t95(self.freedom) * self.error)


def fit(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit the law; with two points there is no error to speak of, and it is infinite.

    Raises:
        ValueError: for fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"a power law needs two sizes, got {len(set(sizes))}.")
    xs, ys = [math.log(n) for n in sizes], [math.log(loss) for loss in losses]
    x, y, freedom = sum(xs) / len(xs), sum(ys) / len(ys), len(xs) - 2
    sxx = sum((value - x) ** 2 for value in xs)
    slope = sum((u - x) * (v - y) for u, v in zip(xs, ys, strict=True)) / sxx
    left = sum((v - y - slope * (u - x)) ** 2 for u, v in zip(xs, ys, strict=True))
    error = math.sqrt(left / freedom / sxx) if freedom else math.inf
    return PowerLaw(math.exp(y - slope * x), -slope, error, freedom)


def parameters(size: str, more: list[str]) -> tuple[int, int]:
    """How many a size has, and tokens in a block."""
    from prac.lab.runs import train

    options = common.options_of(["--model", size, *more])
    tokenizer, _ = train.prepare(options)
    with torch.device("meta"):
        model = models.build(size, tokenizer, options.seq_len)
    return sum(p.numel() for p in model.parameters()), options.seq_len * options.grad_accum


def draw(points: dict[str, list[tuple[int, float]]], laws: dict[str, PowerLaw]) -> Figure:
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=[3, 2])
    means = {
        method: {n: statistics.fmean(loss for m, loss in found if m == n) for n in sorted({n for n, _ in found})}
        for method, found in points.items()
    }
    for index, (method, found) in enumerate(points.items()):
        # Points of all methods on the same size would hide each other, and a line on another one does.
        law, colour, aside = laws[method], common.COLOURS[index], 1.05 ** (index - 1)
        sizes = list(means[method])
        axes.plot([n * aside for n, _ in found], [loss for _, loss in found], "o", color=colour, markersize=4)
        label = f"{method}: N^−{law.b:.3f} (± {law.error:.3f})"
        style = "--" if index else "-"
        axes.plot(sizes, [law.a * n**-law.b for n in sizes], style, color=colour, linewidth=1.3, label=label)
        if method != "plain" and "plain" in means:
            above = [means[method][n] - means["plain"][n] for n in sizes]
            beside.plot(sizes, above, "o-", color=colour, linewidth=1.3, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="validation loss", title="Loss against size")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.legend()
    beside.axhline(0, color=common.COLOURS[-1], linewidth=0.8)
    beside.set(xscale="log", xlabel="parameters", ylabel="nats", title="Loss above plain's")
    return figure


def main() -> None:
    parser = common.trainer(__doc__, methods=METHODS, model=None, steps=None)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help=f"models (default: {' '.join(SIZES)})")
    parser.add_argument("--ratio", type=float, default=2.0, help="tokens for each parameter (default: 2)")
    parser.add_argument("--tokenizer", default="bpe:1024", help="as of `prac train` (default: bpe:1024)")
    arguments = common.parse(parser)
    if {"--model", "--steps"} & set(arguments.more):
        parser.error("--sizes and --ratio decide the models and the steps")
    arguments.more += ["--tokenizer", arguments.tokenizer]
    settings = {method: ["--method", method] for method in arguments.methods}
    data = ["--data", arguments.data, *arguments.more]

    counts: dict[str, int] = {}
    wanted: dict[str, list[str]] = {}
    for size in arguments.sizes:
        counts[size], block = parameters(size, data)
        steps = max(1, round(arguments.ratio * counts[size] / (arguments.batch_size * block)))
        one = argparse.Namespace(**vars(arguments) | {"model": size, "steps": steps})
        folder = common.place(one).relative_to(arguments.runs)
        wanted |= {f"{folder}/{name}": options for name, options in common.jobs(one, settings).items()}
    # The longest first, so that at the end no core is without work.
    order = sorted(wanted, key=lambda name: -counts[wanted[name][1]])
    runs = common.train({name: wanted[name] for name in order}, arguments.runs, arguments.workers)

    rows = [row | {"setting": row["method"]} for row in common.rows_of(runs)]
    points = {m: sorted((r["parameters"], r["val_loss"]) for r in rows if r["method"] == m) for m in arguments.methods}
    points = {method: found for method, found in points.items() if len({n for n, _ in found}) > 1}
    laws = {method: fit(*zip(*found, strict=True)) for method, found in points.items()}
    plain = {(row["parameters"], row["seed"]): row["val_loss"] for row in rows if row["method"] == "plain"}
    claims = []
    for method in laws:
        pairs = [
            (row["parameters"], row["val_loss"] / plain[row["parameters"], row["seed"]])
            for row in rows
            if row["method"] == method != "plain" and (row["parameters"], row["seed"]) in plain
        ]
        if len({n for n, _ in pairs}) < 2 or "plain" not in laws:
            continue
        # Size by size and seed by seed, the law of the ratio has the difference of the exponents.
        lost, tenth = fit(*zip(*pairs, strict=True)), 0.1 * laws["plain"].b
        change = Gap(-lost.b, lost.error, t95(lost.freedom) * lost.error)
        claims += [
            Claim(f"exponent of plain less that of {method} under a tenth of plain's", change, tenth),
            Claim(f"loss of {method} less than 1% above plain's", Gap.of(r - 1 for _, r in pairs), 0.01, "{:+.4f}"),
        ]
    if not claims:
        claims = [Claim("compression keeps the exponent", None)]

    heading = (
        f"{arguments.data}, {arguments.ratio:g} tokens for each parameter, seeds {' '.join(map(str, arguments.seeds))}"
    )
    table = common.table(heading, "size", "parameters", "steps", *arguments.methods)
    for size, count in counts.items():
        of = [row for row in rows if row["model"] == size]
        cells = [common.plus_minus(r["val_loss"] for r in of if r["method"] == m) for m in arguments.methods]
        table.add_row(size, f"{count:,}", str(of[0]["steps"]) if of else "–", *cells)
    exponents = {
        m: f"{law.b:.4f} ± {law.error:.4f}" if math.isfinite(law.error) else f"{law.b:.4f}" for m, law in laws.items()
    }
    table.add_section()
    table.add_row("exponent b ± standard error", "", "", *(exponents.get(m, "–") for m in arguments.methods))
    table.add_section()
    for size in counts:
        of = [row for row in rows if row["model"] == size and row["gradient_variance"] is not None]
        cells = [
            common.plus_minus((r["gradient_variance"] for r in of if r["method"] == m), 2) for m in arguments.methods
        ]
        table.add_row(f"{size}: noise", "", "", *cells)
    decades = math.log10(max(counts.values()) / min(counts.values()))
    table.caption = (
        f"{len(counts)} sizes over {decades:.1f} decades: a slope, not whether the law has a floor. "
        "Noise: variance of the weight gradients of linear layers at the last reading, over their square."
    )
    common.save(
        "figure4", arguments.out, rows, claims=claims, table=table,
        paper="PRAC follows plain training's loss at all sizes from 35M to 1B, on a power law (a plot without numbers)",
        ours="exponents " + ", ".join(f"{method} {text}" for method, text in exponents.items())
        if laws else "no exponent, since it takes two sizes",
        figure=(lambda: draw(points, laws)) if laws else None, laws={method: vars(law) for method, law in laws.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
