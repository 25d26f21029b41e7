"""``prac compare``: methods × seeds on one model and data, in one table, one plot and one page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from prac.lab import methods
from prac.lab.commands import train as command

DEFAULTS = "plain,checkpoint,selective,galore,rso,loract,co-compression,compact,pac,rac,paper,lean,fast,small"

EXAMPLES = """
examples:
  prac compare
      every method on the demo's model and data, three seeds each; some 70 minutes on two cores
  prac compare --methods plain,checkpoint,lean --steps 100 --json small.json
      three methods and shorter runs; the numbers in a file
  prac compare --turns 10
      the same with times to trust: on each seed, all methods take turns of ten steps; 10 GiB
  prac compare --resume
      go on after an interruption; runs that are complete are not run again
  prac compare --methods plain,lean,plain+muon,lean+muon,lean+checkpoint2 --seed 0 1 2 3 4 --workers 2
      combinations, five seeds; two runs at a time, which is faster and makes times worth less
  prac compare --model HuggingFaceTB/SmolLM2-135M --methods plain+lora,checkpoint+lora,velora,lean+lora --lr 5e-4
      adapters on a pretrained model, beside plain LoRA
  prac compare --model llama-60m --data allenai/c4:en --max-tokens 100000000 --tokenizer t5-base --bf16 --steps 2000
      the paper's setting, where there is a GPU
"""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the subcommands."""
    parser = commands.add_parser(
        "compare",
        help="methods side by side: loss, memory, time",
        description="Train with every method on the same model, data order and seeds, and show what each costs "
        "beside plain training, or beside the first of plain+… where plain is not among the methods.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--methods", default=DEFAULTS, metavar="NAMES",
        help=f"with commas between them: {methods.CHOICES} (default: {DEFAULTS})",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N",
        help="runs at a time, sharing the processor; times are comparable with one (default: 1)",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, metavar="STEPS",
        help="the runs of a seed take turns of so many steps, so that a slow minute slows all of them: the times to "
        "trust; all of them are in memory together (default: one run after the other)",
    )  # fmt: skip
    command.add_settings(parser, seeds=[0, 1, 2])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run ``prac compare``; returns 0, or 1 if some of the runs failed.

    Raises:
        ValueError: on bad input, before anything runs.
    """
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}.")
    if arguments.turns is not None:
        if arguments.turns < 1:
            raise ValueError(f"--turns must be at least 1 step, got {arguments.turns}.")
        if arguments.workers > 1:
            raise ValueError("--turns has one run at work at a time: leave --workers away.")
        if os.name != "posix":
            raise ValueError("--turns needs sockets that a process can inherit: Linux or macOS.")
    chosen = methods.names([arguments.methods])
    # One seed after the other: a slow hour of the machine then hits every method alike.
    wanted = [command.options_of(arguments, method, seed) for seed in arguments.seed for method in chosen]
    out = arguments.out or Path("runs") / f"compare-{Path(arguments.model).name}"
    return command.run_several(wanted, out, arguments, argv, "compare", arguments.workers, arguments.turns or 0)
