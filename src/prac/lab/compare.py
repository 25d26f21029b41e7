"""Several methods or seeds: each run in its own process, one after the other, then side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prac.lab import results, run_folder
from prac.lab.options import Options


def folder(out: Path, options: Options) -> Path:
    """The run folder of one of several runs."""
    return out / f"{options.method}-seed{options.seed}"


def run_each(
    wanted: Sequence[Options], out: Path, argv: Sequence[str], resume: bool
) -> tuple[list[results.Row], list[str]]:
    """Run ``python -m prac`` with ``argv`` narrowed to each of ``wanted`` in turn.

    A process of its own gives each run its own peak memory, and a failure takes no other run with it. With
    ``resume``, runs that are complete are not run again.

    Returns:
        The rows of the runs that finished, and a line for each that failed.
    """
    rows, failures = [], []
    for options in wanted:
        target = folder(out, options)
        if resume and (row := run_folder.finished(options, target)):
            rows.append(row)
            continue
        code = launch(narrowed(options, target, argv))
        if code == 0:
            rows += results.read(target / "result.json")["rows"]
        else:
            failures.append(f"{options.method} seed {options.seed} failed (exit code {code}); its folder is {target}")
    return rows, failures


def launch(argv: Sequence[str]) -> int:
    """``prac ARGV…`` in a process of its own; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "prac", *argv], check=False).returncode


def narrowed(options: Options, target: Path, argv: Sequence[str]) -> list[str]:
    """``argv`` narrowed to one run; of an option given twice the last one counts."""
    one = ["--method", options.method, "--seed", str(options.seed), "--out", str(target), "--quiet"]
    return [*_without_json(argv), *one]


def _without_json(argv: Sequence[str]) -> list[str]:
    kept = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--json":
            next(arguments, None)
        elif not argument.startswith("--json="):
            kept.append(argument)
    return kept
