"""``prac bench``: its arguments, and the table. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prac.lab import methods
from prac.lab.materials import blocks
from prac.lab.methods import peers
from prac.lab.report import results
from prac.runtime import files

if TYPE_CHECKING:
    from rich.table import Table

    from prac.lab.measured.block import Cost

EXAMPLES = """
examples:
  prac bench
      a LLaMA block of width 1024 on 2,048 tokens: what each method keeps, how long it takes, what its gradients lose
  prac bench --block gpt2 --hidden 768 --tokens 4096 --methods checkpoint paper --json gpt2.json
      a GPT-2 block, two methods beside plain training; the numbers in a file
  prac bench --device cuda --dtype bf16 --hidden 4096 --tokens 16384 --sequence-length 2048 --intermediate 14336
      on a GPU in bfloat16, at the width of an 8B model
"""


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the subcommands."""
    parser = commands.add_parser(
        "bench",
        help="one transformer block: bytes kept, time and gradient error of each method",
        description="Measure what each method keeps, costs and loses on one transformer block, beside plain training.",
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("the block")
    what.add_argument("--block", default="llama", metavar="NAME", help=f"{', '.join(blocks.FAMILIES)} (default: llama)")
    what.add_argument("--hidden", type=int, default=1024, metavar="N", help="features of its input (default: 1024)")
    what.add_argument("--tokens", type=int, default=2048, metavar="N", help="of all sequences (default: 2048)")
    what.add_argument("--sequence-length", type=int, default=256, metavar="N", help="divides --tokens (default: 256)")
    what.add_argument("--intermediate", type=int, metavar="N",
        help="width of the MLP (default: llama 8/3 of hidden, up to a multiple of 16; gpt2 4 times hidden)",
    )  # fmt: skip
    what.add_argument("--heads", type=int, metavar="N", help="of attention (default: one for 64 features)")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--methods", nargs="+", default=list(peers.DEFAULTS), metavar="NAME",
        help=f"{methods.CHOICES}; plain is always measured (default: {' '.join(peers.DEFAULTS)})",
    )  # fmt: skip
    how.add_argument("--attention-bits", type=int, metavar="N",
        help="measure presets that keep norm groups once more, with the inputs of attention kept in N bits",
    )  # fmt: skip
    how.add_argument("--dtype", default="fp32", choices=list(blocks.DTYPES), help="of everything (default: fp32)")
    how.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    how.add_argument("--repeats", type=int, default=7, metavar="N", help="timed steps of each method (default: 7)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and input (default: 0)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write setting and rows to this file")
    out.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run ``prac bench``; returns 0."""
    files.check_new(arguments.json, arguments.overwrite)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here.")
    shape = blocks.shape(
        arguments.block,
        arguments.hidden,
        arguments.tokens,
        arguments.sequence_length,
        arguments.intermediate,
        arguments.heads,
    )
    chosen = peers.variants(methods.names(arguments.methods), arguments.attention_bits)
    from rich.console import Console
    from rich.progress import Progress

    from prac.lab.measured.block import REFRESHES, measure_block

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        refreshes = REFRESHES * sum(method.config is not None for method in chosen.values())
        task = progress.add_task("", total=len(chosen) * (1 + arguments.repeats) + refreshes)
        rows = measure_block(
            shape,
            list(chosen),
            dtype=blocks.DTYPES[arguments.dtype],
            device=device,
            repeats=arguments.repeats,
            seed=arguments.seed,
            notify=lambda doing: progress.update(task, advance=1, description=doing),
        )
    setting = asdict(shape)
    setting = {
        "block": setting.pop("family"),
        **setting,
        "dtype": arguments.dtype,
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
        "command": " ".join(["prac", *argv]),
    }
    if arguments.json:
        document = {"setting": setting} | results.document("bench", [row.to_dict() for row in rows])
        files.write_json(arguments.json, document)
    Console().print(table(rows, setting))
    return 0


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def table(rows: list[Cost], setting: dict[str, Any]) -> Table:
    """The rows for the terminal, with the setting above and what the columns mean below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = (
        f"{setting['block']} block, {setting['hidden']} hidden ({setting['intermediate']} in the MLP, "
        f"{setting['heads']} heads), {setting['tokens']:,} tokens in sequences of {setting['sequence_length']}, "
        f"{setting['dtype']}; {setting['device_name']}, {setting['threads']} threads, torch {setting['torch']}"
    )
    justify: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    result = Table(title=title, caption=_footnote(rows), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **justify)
    for index, heading in enumerate(HEADINGS):
        result.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        result.add_row(*_cells(row))
    return result


HEADINGS = (
    "method",
    "kept\nunits",
    "kept\nMiB",
    "peak\nMiB",
    "ops",
    "time",
    "quartiles",
    "error\nof dX",
    "error\nof dW",
)


def _cells(row: Cost) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.kept_units:.2f}",
        f"{row.kept_bytes / 2**20:,.1f}",
        f"{row.peak_bytes / 2**20:,.1f}",
        f"{row.flops_ratio:.2f}",
        f"{row.time_ratio:.2f}",
        f"{row.time_spread[0]:.2f}–{row.time_spread[1]:.2f}",
        _error(row.input_grad_error),
        _error(row.weight_grad_error),
    )


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}" if value >= 5e-4 else f"{value:.0e}"


def _footnote(rows: list[Cost]) -> str:
    shares = [f"{row.method} {row.refresh_share:.1%}" for row in rows if row.refresh_share is not None]
    refreshes = f" Refreshing subspaces, left out above, adds over T1 steps: {', '.join(shares)}." if shares else ""
    return (
        "A unit is one activation of tokens × hidden. Peak: of a step, with the gradients of the weights. "
        f"Ops (matrix products and attention) and time are ratios to plain, which takes {rows[0].time_ms:,.1f} ms. "
        "Errors: ‖g̃ − g‖ / ‖g‖ for one draw, of the input's gradient and of all weights' together." + refreshes
    )
