"""Rank × bits: what it costs to keep the x̂ of the norm groups at a rank, in few bits, or both.

    python benchmarks/frontier.py                      # every run, then the map; goes on where it stopped
    python benchmarks/frontier.py --seeds 0 --workers 1

x̂ of each norm group is kept as PRAC of rank r (half principal, half random) with Z in 16, 8 or 4 bits, or at full rank
in 8, 4 or 2 bits; everything else as in `lean`, so that a difference is x̂'s. Then the same for the bits of g and u with
x̂ in 4. Of each setting:

- loss: `llama-tiny` on the State of the Union speeches, the difference to plain training of the same seed;
- variance: E‖x̃ − x̂‖² / ‖x̂‖² of the q, k, v groups of the model that plain training made, on text it has not seen, with
  subspaces from another batch;
- bytes, operations and time: one block of width 1024 and 2,048 tokens, as `prac bench` measures it.

Writes `results/frontier.json` and `results/frontier.svg`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import forest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import prac
from prac import PRESETS, Bits, Config, Rank
from prac.lab.materials import blocks
from prac.lab.measured.block import measure_block
from prac.lab.report import plots, results
from prac.lab.runs import checkpoints, several, train
from prac.lab.runs.options import options

HERE = Path(__file__).parent / "results"
RANKS, RANK_BITS, FULL_BITS = (0.1, 0.3, 0.6), (16, 8, 4), (8, 4, 2)
LEAN = PRESETS["lean"]


def settings() -> dict[str, Config | None]:
    """Every point of the map, by name."""
    found: dict[str, Config | None] = {"plain": None, "paper": PRESETS["paper"]}
    for bits in FULL_BITS:
        found[f"full rank, {bits} bits"] = LEAN.replace(group=Bits(bits))
    for bits in FULL_BITS[1:]:
        found[f"4 bits, g and u in {bits}"] = LEAN.replace(activation=Bits(bits))
    for rank in RANKS:
        for bits in RANK_BITS:
            found[f"rank {rank}n, {bits} bits"] = LEAN.replace(group=Rank(rank / 2, rank / 2, bits=Bits(bits)))
    found["everything in 4 bits"] = PRESETS["small"]
    return found


def command(name: str, config: Config | None) -> list[str]:
    """The options of `prac train` for one setting."""
    if config is None or name == "paper":
        return ["--method", name]
    kinds = ("group", "linear", "norm", "activation")
    options = [part for kind in kinds for part in (f"--{kind}", str(getattr(config, kind)).lower())]
    attention = [] if config.attention_bits is None else ["--attention-bits", str(config.attention_bits)]
    return ["--method", "lean", *options, *attention]


def losses(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """The final validation loss of every setting and seed."""
    common = ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size), "--eval-every", "0"]
    jobs = {(seed, name): f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
            for seed in arguments.seeds for name in settings()}  # fmt: skip
    wanted = {
        job: [*common, *command(name, settings()[name]), "--seed", str(seed)] for (seed, name), job in jobs.items()
    }
    runs = several.gather(wanted, arguments.runs, arguments.workers)
    if len(runs) < len(jobs):
        raise SystemExit(f"{len(jobs) - len(runs)} runs failed; their folders are in {arguments.runs}")
    return {name: {seed: runs[jobs[seed, name]]["row"]["val_loss"] for seed in arguments.seeds} for name in settings()}


def variances(folder: Path) -> dict[str, float]:
    """The relative variance of x̃ in the q, k, v groups, averaged over the blocks, of the model in a run folder."""
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoints.newest(folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    _, data = train.prepare(options("plain"))
    batches = [train.collate([data.train[i] for i in range(s, s + 16)]) for s in (0, 16)]
    found = {}
    for name, config in settings().items():
        if config is None or config.group is None:
            continue
        twin = copy.deepcopy(model).train()
        handle = prac.compress(twin, config)
        twin(**batches[0]).loss.backward()
        errors = handle.reconstruction_error(batches[1])
        found[name] = statistics.mean(e for layer, e in errors.items() if layer.endswith("input_layernorm"))
    return found


def stored(config: Config | None) -> float | None:
    """Bits for each value of x̂, scales left out; None for a setting that is not about x̂."""
    if config is None or config != LEAN.replace(group=config.group):
        return None
    keep = config.group
    if isinstance(keep, Rank):
        return (keep.r1 + keep.r2) * (keep.bits.bits if keep.bits else 32)
    return None if keep is None else float(keep.bits)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Loss beside what x̂ takes, what the whole block keeps, and operations."""
    about_x_hat = ["full rank", *(f"rank {rank}n" for rank in reversed(RANKS))]
    groups: dict[str, list[forest.Entry]] = {f"x̂ at {how}": [] for how in about_x_hat} | {"other settings": []}
    colours = dict(zip(groups, plots.PALETTE[1:], strict=False))
    for row in rows:
        if (config := settings()[row["method"]]) is None:
            continue
        x_hat, group, name = stored(config), "other settings", row["method"]
        if x_hat is not None:
            how, _, name = row["method"].partition(", ")
            group = f"x̂ at {how}"
        counted = [None if value is None else (value, 0.0) for value in (x_hat, row["kept_units"], row["flops_ratio"])]
        entry = forest.Entry(name, colours[group], [(row["loss_gap"], row["loss_spread"]), *counted])
        groups[group].append(entry)
    panels = [
        forest.Panel("Validation loss above plain training", "nats", reference=0),
        forest.Panel("x̂", "bits for each value", logarithmic=True),
        forest.Panel("Kept of a block", "tokens × hidden"),
        forest.Panel("Operations of a block", "plain = 1", reference=1),
    ]
    seeds = len(rows[0]["val_loss"])
    return forest.draw(
        groups, panels, f"Means of differences seed by seed; bars: their standard deviation, {seeds} seeds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps (default: 160)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of 128 tokens per step (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"), help="run folders go here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the timing (default: 7)")
    parser.add_argument("--losses-only", action="store_true", help="train, and stop there")
    arguments = parser.parse_args()

    found = losses(arguments)
    if arguments.losses_only:
        return
    spread = variances(arguments.runs / "plain-seed0")
    shape = blocks.shape("llama", hidden=1024, tokens=2048)
    costs = {row.method: row for row in measure_block(shape, settings(), repeats=arguments.repeats)}
    rows = []
    table = Table(
        title=f"llama-tiny, {arguments.steps} steps, seeds {arguments.seeds}: what x̂ in few bits or ranks costs"
    )
    for column in ("setting", "loss − plain", "±", "variance", "kept units", "operations", "time", "error of dX"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, by_seed in found.items():
        gaps = [loss - found["plain"][seed] for seed, loss in by_seed.items()]
        row, gap = costs[name], statistics.mean(gaps)
        deviation = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        rows.append(
            row.to_dict()
            | {"val_loss": by_seed, "loss_gap": gap, "loss_spread": deviation, "variance": spread.get(name)}
        )
        table.add_row(
            name, f"{gap:+.4f}", f"{deviation:.4f}", f"{spread[name]:.4f}" if name in spread else "–",
            f"{row.kept_units:.2f}", f"{row.flops_ratio:.2f}", f"{row.time_ratio:.2f}", f"{row.input_grad_error:.3f}",
        )  # fmt: skip
    results.write(HERE / "frontier.json", "benchmarks/frontier.py", rows)
    plots.save(HERE / "frontier.svg", lambda: draw(rows))
    Console(width=140).print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
