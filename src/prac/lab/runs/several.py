"""Several methods or seeds: each run in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any

from prac.lab.report import page, results
from prac.lab.runs import children, run_folder, turns
from prac.lab.runs.options import Options


def folder(out: Path, options: Options) -> Path:
    """The run folder of one of several runs."""
    return out / f"{options.method}-seed{options.seed}"


def run_each(
    wanted: Sequence[Options],
    out: Path,
    argv: Sequence[str],
    read: dict[str, str] | None,
    workers: int = 1,
    steps_of_turn: int = 0,
) -> tuple[list[results.Row], list[str]]:
    """Run ``python -m prac`` with ``argv`` narrowed to each of ``wanted``, ``workers`` at a time.

    A process of its own gives each run its own peak memory, and a failure takes no other run with it. With ``read``,
    digests of the text and the tokenizer, runs of these that are complete are not run again. With ``steps_of_turn``,
    those of one seed take turns of so many steps (:mod:`prac.lab.runs.turns`).

    Returns:
        The rows of the runs that finished, and a line for each that failed, in the order of ``wanted``.
    """
    done = [run_folder.finished(options, folder(out, options), read) if read else None for options in wanted]
    missing = [options for options, row in zip(wanted, done, strict=True) if row is None]
    commands = [narrowed(options, folder(out, options), argv) for options in missing]
    if steps_of_turn:
        codes = []
        for _, group in groupby(zip(missing, commands, strict=True), key=lambda each: each[0].seed):
            codes += turns.take_turns([command for _, command in group], steps_of_turn)
    else:
        codes = children.run_all(commands, workers)

    rows, failures, ended = [], [], iter(codes)
    for options, row in zip(wanted, done, strict=True):
        target = folder(out, options)
        if row is not None:
            rows.append(row)
        elif (code := next(ended)) == 0:
            rows.append(results.read(target / "result.json")["rows"][0])
        else:
            failures.append(f"{options.method} seed {options.seed} failed (exit code {code}); its folder is {target}")
    return rows, failures


def gather(jobs: Mapping[str, Sequence[str]], folder: Path, workers: int) -> dict[str, dict[str, Any]]:
    """Run ``prac train`` for each of ``jobs`` that is not complete yet, and say how it ended.

    Args:
        jobs: arguments of ``prac train``, by the name of the run and of its folder in ``folder``.
        folder: of all of them.
        workers: runs at a time; the processor's cores are shared out among them.

    Returns:
        The runs that came through, as :func:`prac.lab.report.page.read_run` has them, in the order of ``jobs``.
    """
    from rich.console import Console

    console, threads = Console(stderr=True), children.threads_each(workers)

    def one(name: str) -> dict[str, Any] | None:
        where = ["--out", str(folder / name), "--resume", "--quiet"]
        code = children.launch(["train", "--save-every", "0", *jobs[name], *where], threads)
        return page.read_run(folder / name) if code == 0 else None

    found = {}
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(one, name): name for name in jobs}
        for count, future in enumerate(as_completed(waiting), 1):
            name, run = waiting[future], future.result()
            ended = f"failed and is left out: {folder / name}"
            if run is not None:
                found[name], ended = run, f"loss {run['row']['val_loss']:.4f}"
            console.print(f"[{count}/{len(jobs)}] {name}: {ended}", markup=False, soft_wrap=True)
    return {name: found[name] for name in jobs if name in found}


def narrowed(options: Options, target: Path, argv: Sequence[str]) -> list[str]:
    """``argv`` narrowed to one run of ``prac train``; of an option given twice the last one counts."""
    one = ["--method", options.method, "--seed", str(options.seed), "--out", str(target), "--quiet"]
    return ["train", *_without(argv[1:], ("--json", "--methods", "--workers", "--turns")), *one]


def _without(argv: Sequence[str], names: tuple[str, ...]) -> list[str]:
    """``argv`` without some options of one value each."""
    kept = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in names:
            next(arguments, None)
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return kept
