"""Bytes where they count: does `prac.allocate` train better than one rank for all, at the same bytes?

    python benchmarks/adaptive.py                      # every run, then the figure; goes on where it stopped
    python benchmarks/adaptive.py --seeds 0 --workers 1

`llama-tiny` on the State of the Union speeches. Each policy keeps its tensors alike; against it, at no more bytes, what
`prac.allocate` chooses for the same seed's model after a few steps of plain training (`--warm`):

- ranks and bits: whatever leaves the least sum of squared errors of gradients;
- ranks: ranks and splits alone, with Z in as many bits as the policy has it;
- ranks, relative: the same, each tensor's error relative to its gradients, as Adam sees them;
- ranks, held out: as relative, judged with bases of one half of the batch by the gradients of the other;
- ranks, initial: as ranks, for the weights at initialisation.

Every difference is between two runs of the same seed. Writes `results/adaptive.json` and `results/adaptive.svg`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import forest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from prac import PRESETS, Bits, Config, Rank
from prac.allocation import Allocation, allocate
from prac.lab.materials import models
from prac.lab.report import plots, results
from prac.lab.runs import train
from prac.lab.runs.options import Options, options
from prac.runtime import files

HERE = Path(__file__).parent / "results"
LEAN, PAPER = PRESETS["lean"], PRESETS["paper"].replace(norm=None, activation=None)
POLICIES: dict[str, Config] = {
    "norm groups, 0.2n in 8 bits": LEAN.replace(group=Rank(0.1, 0.1, bits=Bits(8))),
    "linear layers, 0.3n": PAPER.replace(linear=Rank(0.15, 0.15)),
    "linear layers, 0.6n": PAPER,
    "norm groups, 4 bits": LEAN,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ranks and bits": {},
    "ranks": {"ranks": True},
    "ranks, relative": {"ranks": True, "relative": True},
    "ranks, held out": {"ranks": True, "relative": True, "held_out": True},
    "ranks, initial": {"ranks": True, "initial": True},
}


def kept(policy: Config) -> Any:
    """How a policy keeps what is up for choice."""
    return policy.linear if policy.group is None else policy.group


def variants_of(name: str) -> list[str]:
    """What a policy is compared with; one of bits has no ranks to be chosen alone."""
    return [each for each, how in VARIANTS.items() if isinstance(kept(POLICIES[name]), Rank) or "ranks" not in how]


class Snapshots(TrainerCallback):
    """The weights before the first step and after ``warm`` steps, in the run's folder."""

    def __init__(self, folder: Path, warm: int) -> None:
        self.folder, self.warm = folder, warm

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Those at initialisation."""
        if state.global_step == 0:
            self._save(model, "initial")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Those after ``warm`` steps."""
        if state.global_step == self.warm:
            self._save(model, f"warm{self.warm}")

    def _save(self, model: Any, name: str) -> None:
        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        files.write(self.folder / f"{name}.pt", stream.getvalue())


def run(job: tuple[Options, Path, int]) -> float:
    """Train, or take the result that is there; the final validation loss."""
    options, folder, warm = job
    torch.set_num_threads(1)
    snapshots = [Snapshots(folder / "weights", warm)] if options.config is None else []
    row = train.run(options, folder, resume=True, callbacks=snapshots)
    print(f"{folder.name:50s} {row['val_loss']:.4f}", flush=True)
    return float(row["val_loss"])


def allocated(options: Options, weights: Path, policy: Config, variant: str, blocks: int) -> Allocation:
    """What :func:`prac.allocate` chooses at the policy's bytes for the weights in a file."""
    how = {key: value for key, value in VARIANTS[variant].items() if key in ("relative", "held_out")}
    if "ranks" in VARIANTS[variant]:
        bits = kept(policy).bits
        how |= {"bits": (), "rank_bits": (None if bits is None else bits.bits,)}
    tokenizer, data = train.prepare(options)
    set_seed(options.seed)
    model = models.build(options.model, tokenizer, options.seq_len)
    model.load_state_dict(torch.load(weights, weights_only=True))
    batch = train.collate([data.train[i] for i in range(blocks)])
    return allocate(model, batch, policy, policy, **how)


def slug(*parts: Any) -> str:
    return "-".join(str(part).replace(",", "").replace(" ", "-") for part in parts)


def losses(arguments: argparse.Namespace) -> tuple[dict[tuple[str, str, int], float], dict[Any, Allocation]]:
    """The loss of every policy, variant and seed; plain training is the policy ``""``. And what was allocated."""
    how = {"steps": arguments.steps, "batch_size": arguments.batch_size, "eval_every": 0, "save_every": 0}
    plain = {seed: options("plain", seed, **how) for seed in arguments.seeds}
    recipe = models.recipe("llama-tiny")
    interval = {"T1": recipe.interval, "T2": recipe.interval}

    os.environ["OMP_NUM_THREADS"] = "1"
    train.prepare(next(iter(plain.values())))
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        folders = {seed: arguments.runs / slug("plain", f"seed{seed}") for seed in plain}
        done = pool.map(run, [(plain[seed], folders[seed], arguments.warm) for seed in plain])
        found = {("", "plain", seed): loss for seed, loss in zip(plain, done, strict=True)}

        chosen: dict[tuple[str, str, int], Allocation] = {}
        configs: dict[tuple[str, str, int], Config] = {}
        for name in arguments.policies:
            policy = POLICIES[name].replace(**interval)
            for seed in plain:
                configs[name, "uniform", seed] = policy.replace(seed=seed)
                for variant in variants_of(name):
                    at = "initial" if "initial" in VARIANTS[variant] else f"warm{arguments.warm}"
                    file = folders[seed] / "weights" / f"{at}.pt"
                    key = (name, variant, seed)
                    chosen[key] = allocated(plain[seed], file, policy, variant, arguments.calibration_blocks)
                    configs[key] = chosen[key].config.replace(seed=seed)
        jobs = [
            (dataclasses.replace(plain[seed], method="lean" if config.group else "paper", config=config),
             arguments.runs / slug(name, variant, f"seed{seed}"), 0)
            for (name, variant, seed), config in configs.items()
        ]  # fmt: skip
        found |= dict(zip(configs, pool.map(run, jobs), strict=True))
    return found, chosen


def rows_of(
    found: dict[tuple[str, str, int], float], chosen: dict[Any, Allocation], seeds: list[int], policies: list[str]
) -> list[dict[str, Any]]:
    """A row for each policy and variant; differences are paired by seed."""
    rows = []
    for name in policies:
        for variant in ("uniform", *variants_of(name)):
            by_seed = {seed: found[name, variant, seed] for seed in seeds}
            to_plain = [loss - found["", "plain", seed] for seed, loss in by_seed.items()]
            to_uniform = [loss - found[name, "uniform", seed] for seed, loss in by_seed.items()]
            gap, gap_spread = results.summary(to_plain)
            against, against_spread = results.summary(to_uniform)
            mine = [chosen[name, variant, seed] for seed in seeds if variant != "uniform"]
            rows.append(
                {
                    "policy": name,
                    "variant": variant,
                    "val_loss": by_seed,
                    "plain_loss": {seed: found["", "plain", seed] for seed in seeds},
                    "loss_gap": gap,
                    "loss_gap_spread": gap_spread,
                    "against_uniform": against,
                    "against_uniform_spread": against_spread,
                    "bytes_per_token": [each.bytes_per_token for each in mine],
                    "budget": [each.budget for each in mine],
                    # Of the gradients' predicted variance, allocated over uniform.
                    "variance_ratio": [each.variance / (each.uniform_variance or 1.0) for each in mine],
                    "layers": {seed: chosen[name, variant, seed].config.to_dict()["layers"] for seed in seeds if mine},
                }
            )
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Loss above plain training, and above uniform ranks, for each policy."""
    groups: dict[str, list[forest.Entry]] = {}
    variants = ("uniform", *VARIANTS)
    for row in rows:
        index = variants.index(row["variant"])
        above = row["loss_gap"], row["loss_gap_spread"]
        against = (row["against_uniform"], row["against_uniform_spread"]) if index else None
        entry = forest.Entry(row["variant"], plots.PALETTE[index], [above, against])
        groups.setdefault(row["policy"], []).append(entry)
    panels = [
        forest.Panel("Validation loss above plain training", "nats", reference=0),
        forest.Panel("Validation loss above the uniform policy", "nats", reference=0),
    ]
    seeds = len(rows[0]["val_loss"])
    return forest.draw(
        groups, panels, f"Means of differences seed by seed; bars: their standard deviation, {seeds} seeds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps (default: 160)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of 128 tokens per step (default: 8)")
    parser.add_argument("--warm", type=int, default=20, help="steps of plain training before calibration (default: 20)")
    parser.add_argument("--calibration-blocks", type=int, default=32, help="of 128 tokens (default: 32)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive"), help="run folders go here")
    parser.add_argument("--out", type=Path, default=HERE, help="the JSON and the figure go here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    arguments = parser.parse_args()
    if arguments.warm > arguments.steps:
        parser.error(f"--warm {arguments.warm} is more than --steps {arguments.steps}")

    found, chosen = losses(arguments)
    rows = rows_of(found, chosen, arguments.seeds, arguments.policies)
    table = Table(title=f"llama-tiny, {arguments.steps} steps, seeds {arguments.seeds}: what prac.allocate chose")
    for column in ("policy", "chosen", "loss − plain", "±", "loss − uniform", "±", "variance / uniform"):
        table.add_column(column, justify="left" if column in ("policy", "chosen") else "right")
    for row in rows:
        ratio = f"{statistics.mean(row['variance_ratio']):.3f}" if row["variance_ratio"] else "1"
        table.add_row(
            row["policy"], row["variant"], f"{row['loss_gap']:+.4f}", f"{row['loss_gap_spread']:.4f}",
            f"{row['against_uniform']:+.4f}", f"{row['against_uniform_spread']:.4f}", ratio,
        )  # fmt: skip
    results.write(arguments.out / "adaptive.json", "benchmarks/adaptive.py", rows)
    plots.save(arguments.out / "adaptive.svg", lambda: draw(rows))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
