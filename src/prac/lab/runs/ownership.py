"""Whose a folder is: prac writes into none but its own, one process at a time."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

import prac
from prac.lab.materials import models
from prac.lab.report import results
from prac.runtime import files

if TYPE_CHECKING:
    from prac.lab.runs.options import Options

MARK = "prac-run.json"  # what lies beside it is prac's to replace
LOCK = ".prac.lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Own a folder while something runs in it; it is made, and marked as prac's.

    The lock is the kernel's, so it goes with the process, however that ends. Where nothing was written, nothing is
    left.

    Raises:
        ValueError: if ``out`` is not prac's (:func:`check_ours`), or another process is at work in it.
    """
    check_ours(out)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{out} is in use by {_holder(out)}: wait for it, end it, or choose another --out.") from None
    try:
        mark = {"made_by": f"prac {prac.__version__}", "process": os.getpid(), "host": socket.gethostname()}
        mark |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": " ".join(sys.argv)}
        files.write_json(out / MARK, mark)
        yield
    finally:
        with suppress(OSError):  # somebody deleted it, or keeps something there
            if {path.name for path in out.iterdir()} <= {MARK, LOCK}:
                for name in (MARK, LOCK):
                    (out / name).unlink(missing_ok=True)
                if made:
                    out.rmdir()
        lock.release()


def check_ours(out: Path) -> None:
    """Refuse a folder that holds what prac did not make.

    Raises:
        ValueError: if ``out`` is a file, or has something in it and no mark.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder.")
    if stranger := _stranger(out):
        raise ValueError(
            f"{out} holds what prac did not make ({stranger}) and lacks its mark, {MARK}: nothing there is touched. "
            "Choose another --out, or move what is there away."
        )


def _stranger(out: Path) -> str | None:
    """The first thing in an unmarked folder that is not prac's: neither its lock nor a folder that has the mark."""
    if not out.is_dir() or (out / MARK).is_file():
        return None
    names = (path.name for path in sorted(out.iterdir()) if path.name != LOCK and not (path / MARK).is_file())
    return next(names, None)


def _holder(out: Path) -> str:
    try:
        mark = results.read(out / MARK)
        return f"process {mark['process']} on {mark['host']} since {mark['since']} ({mark['command']})"
    except (OSError, ValueError, KeyError):  # it has only just begun
        return "another process"


def check_apart(options: Options, out: Path, option: str = "--out") -> None:
    """Refuse to write where the model, the data or the tokenizer of a run are read from.

    Raises:
        ValueError: if one of them is ``out``, holds it or lies in it, by whatever path.
    """
    read = {"--data": options.data, "--tokenizer": options.tokenizer}
    if options.model not in models.SIZES:
        read["--model"] = options.model
    for name, given in read.items():
        path = Path(given).expanduser()
        if path.exists() and (_within(out, path) or _within(path, out)):
            raise ValueError(
                f"{option} {out} and {name} {given} are one and the same, or one holds the other: what is read would "
                f"be written over. Choose another {option}."
            )


def _within(inner: Path, outer: Path) -> bool:
    """By identity rather than by name, so that links and mounts are seen through."""
    path = inner.resolve()
    return outer.exists() and any(each.exists() and each.samefile(outer) for each in (path, *path.parents))
