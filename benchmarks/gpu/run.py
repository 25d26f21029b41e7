"""Measure prac on one CUDA GPU: stages of rows, each of which goes on where it stopped.

    python benchmarks/gpu/run.py                             # every stage in order; `make gpu` does this
    python benchmarks/gpu/run.py --stage block --out h100    # one stage: one LLaMA block, h100/block.json
    python benchmarks/gpu/run.py --stage models --only lean small --again
    python benchmarks/gpu/run.py --stage loss --tokens tokens.npy --limit-s 3000
    python benchmarks/gpu/run.py --toy                       # the same ways at toy size on a CPU, in under a minute

tests      tests/test_cuda.py, where there is pytest
block      one LLaMA block of width 2048 on 32,768 tokens: time, bytes kept, peak, errors of the gradients
block4096  one of width 4096 on 16,384 tokens in long sequences
models     whole training steps of three LLaMAs: time, peak, held
loss       a LLaMA-130M trained on text, two seeds
rates      LLaMA-60M for a short while, by each method at each learning rate of the paper's grid
pretraining  LLaMA-60M and -130M from scratch, by the paper's method and those it is compared with
stall      a tiny LLaMA, by all ways to refresh subspaces, three seeds

It needs torch and transformers; Liger-Kernel and pytest are used where they are. A stage begins no row that would not
be over within --limit-s: call it again until no row is left. `show.py` prints the files once more.

Ends with 0; with 1 if a row failed; with 2 if there is no GPU or the command is wrong; with 3 if rows are left for want
of time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rows import Job, Row, Sheet

# The stages in their order, and the file of each.
STAGES = {
    "tests": "suite", "block": "block", "block4096": "block", "models": "models", "loss": "loss",
    "rates": "pretraining", "pretraining": "pretraining", "stall": "stall",
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add(
        "--stage",
        nargs="+",
        choices=list(STAGES),
        default=list(STAGES),
        metavar="NAME",
        help="(default: all, in order)",
    )
    add("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="of the JSON files (default: runs/gpu)")
    add("--limit-s", type=float, default=540, metavar="S", help="seconds for each stage (default: 540)")
    how = "measure rows again that are there already: all, or those that failed"
    add("--again", nargs="?", const="all", choices=["all", "failed"], help=how)
    add("--only", nargs="+", metavar="NAME", help="rows of these methods alone (default: all)")
    how = "for stages that train: ids of tokens, .npy or .pt (default: the bytes of Python's own sources)"
    add("--tokens", metavar="FILE", help=how)
    how = "run attention by torch's flash kernel rather than the one that torch prefers; these are rows of their own"
    add("--flash", action="store_true", help=how)
    add("--toy", action="store_true", help="toy sizes, on the CPU: tries the scripts and says nothing else")
    return result


def main() -> int:
    command = parser()
    arguments = command.parse_args()
    if arguments.limit_s <= 0:
        command.error(f"--limit-s must be above 0, got {arguments.limit_s:g}.")
    if arguments.toy and arguments.out == command.get_default("out"):
        arguments.out = Path("runs/gpu-toy")
    missing = [name for name in ("torch", "transformers", "prac") if find_spec(name) is None]
    if missing:
        command.error(
            f"no {', '.join(missing)} here: install torch and transformers; PYTHONPATH={ROOT / 'src'} has prac."
        )
    import torch

    if not arguments.toy and not torch.cuda.is_available():
        print("benchmarks/gpu: torch finds no CUDA GPU here; --toy tries the scripts on a CPU.", file=sys.stderr)
        return 2
    import rows

    import prac

    device = "cpu" if arguments.toy else "cuda"
    failed = left = 0
    try:
        jobs = planned(arguments)
        context, name = rows.processes(device)
        sheets = {stage: rows.Sheet(arguments.out / f"{stage}.json", made_by(stage, arguments), name) for stage in jobs}
        print(f"{name}, torch {torch.__version__}, prac in {Path(prac.__file__).parent}", flush=True)
        for stage, sheet in sheets.items():
            bad, over = run(stage, jobs[stage], sheet, context, device, arguments)
            failed, left = failed + bad, left + over
    except (ValueError, OSError) as error:
        command.error(str(error))
    return 1 if failed else 3 if left else 0


def planned(arguments: argparse.Namespace) -> dict[str, list[Job]]:
    """The rows of each stage that were asked for.

    Raises:
        ValueError: for a method that none of the stages has, or tokens that are none.
    """
    found: dict[str, list[Job]] = {}
    for stage in sorted(set(arguments.stage), key=list(STAGES).index):
        module: Any = importlib.import_module(STAGES[stage])
        found[stage] = module.jobs(stage, arguments.toy, arguments.flash, arguments.tokens)
    if arguments.only is None:
        return found
    known = {name: None for jobs in found.values() for job in jobs for name in names(job)}
    if unknown := [name for name in arguments.only if name not in known]:
        raise ValueError(f"--only {unknown[0]!r}: there is no such row; choose from {', '.join(known)}.")
    return {stage: [job for job in jobs if names(job) & set(arguments.only)] for stage, jobs in found.items()}


def names(job: Job) -> set[str]:
    """What a row may be called: its own name, or its method's."""
    return {job.name, job.setting.get("method", job.name)}


def made_by(stage: str, arguments: argparse.Namespace) -> str:
    """The command that makes a row of a stage, whatever else was made in the same call."""
    options = [option for option in ("--flash", "--toy") if vars(arguments)[option[2:]]]
    if STAGES[stage] in ("loss", "pretraining", "stall") and arguments.tokens:
        options += ["--tokens", Path(arguments.tokens).name]
    return " ".join(["python benchmarks/gpu/run.py --stage", stage, *options])


def run(
    stage: str, jobs: list[Job], sheet: Sheet, context: Any, device: str, arguments: argparse.Namespace
) -> tuple[int, int]:
    """Measure what is missing of a stage; how many of its rows failed, and how many are left."""
    import rows
    import show

    begun, spent, expected, left = time.monotonic(), 0.0, 0.0, 0
    print(f"\n{stage}: {sheet.path}", flush=True)
    for job in jobs:
        if not due(sheet.find(job), job, arguments.again):
            continue
        label = ", ".join(filter(None, (job.setting.get("model"), job.name)))
        if job.left_out:
            sheet.put(job, {"outcome": "left out", "reason": job.left_out})
            print(f"  {label}: left out, {job.left_out}", flush=True)
            continue
        # Rows of a slower machine take longer than was estimated, by as much as those before did.
        needed = job.estimate_s * (max(1.0, spent / expected) if expected else 1.0)
        over = time.monotonic() - begun
        if expected and over + needed > arguments.limit_s:  # the first one begins in any case: else it never would
            left += 1
            continue
        start = time.monotonic()
        for found in rows.measured(context, job, device, arguments.limit_s - over):
            sheet.put(job, found)
        if found["outcome"] == "stopped" and expected:  # it began late: another call has more time for it
            found["outcome"], left = "unfinished", left + 1
            sheet.put(job, found)
        spent, expected = spent + time.monotonic() - start, expected + job.estimate_s
        because = f": {found['reason']}" if found["reason"] else ""
        print(f"  {label}: {found['outcome']} in {found['wall_s']:.0f} s{because}", flush=True)
    mine: list[Row] = [row for job in jobs if (row := sheet.find(job))]
    print("\n".join(["", *show.table(stage, mine)]), flush=True)
    if left:
        print(f"{left} rows of {stage} are left for want of time: call this again.", flush=True)
    return sum(row["outcome"] in rows.BAD for row in mine), left


def due(row: Row | None, job: Job, again: str | None) -> bool:
    """Whether a job is to be done, given its row in the file."""
    from rows import BAD

    if row is None or row["outcome"] == "unfinished":
        return True
    if job.left_out:  # what was measured while it could be stays
        return row["outcome"] == "left out" and row["reason"] != job.left_out
    return again == "all" or row["outcome"] == "left out" or (again == "failed" and row["outcome"] in BAD)


if __name__ == "__main__":
    sys.exit(main())
