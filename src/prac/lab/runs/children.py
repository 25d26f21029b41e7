"""Processes of ``prac`` that another one starts: they end when it does, however that comes about."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

PARENT = "PRAC_PARENT"  # in a child's environment: the process that started it
GRACE = 10  # seconds to end by itself


@contextmanager
def started(
    argv: Sequence[str], environment: dict[str, str] | None = None, **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """``prac ARGV…``, by this Python, in a process of its own that is ended if it still runs in the end."""
    variables = os.environ | {PARENT: str(os.getpid())} | (environment or {})
    process = subprocess.Popen(command(argv), env=variables, **how)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command(argv: Sequence[str]) -> list[str]:
    """``prac ARGV…``, by this Python."""
    return [sys.executable, "-m", "prac", *argv]


def launch(argv: Sequence[str], threads: int | None = None) -> int:
    """``prac ARGV…`` in a process of its own, on so many threads; returns its exit code."""
    with started(argv, on_threads(threads)) as process:
        return process.wait()


def run_all(commands: Sequence[Sequence[str]], workers: int) -> list[int]:
    """Each of ``commands`` in a process of its own, so many at a time; returns their exit codes."""
    environment = on_threads(threads_each(workers))
    codes: list[int] = [0] * len(commands)
    waiting = deque(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    with ExitStack() as ends:
        while waiting or running:
            while waiting and len(running) < workers:
                index, argv = waiting.popleft()
                running[index] = ends.enter_context(started(argv, environment))
            for index, process in list(running.items()):
                if (code := process.poll()) is not None:
                    codes[index] = code
                    del running[index]
            time.sleep(0.05)
    return codes


def threads_each(workers: int) -> int | None:
    """Threads for each of so many processes at a time: their share of the cores. One alone has what torch gives it."""
    return None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)


def on_threads(count: int | None) -> dict[str, str]:
    """The environment of a process on so many threads."""
    return {} if count is None else {"OMP_NUM_THREADS": str(count)}


def end_with_parent() -> None:
    """End this process when the one that started it is gone: another ``prac``, or torchrun."""
    if os.name != "posix" or not {PARENT, "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return
    parent = int(os.environ.pop(PARENT, os.getppid()))
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def end_with_pool() -> None:
    """The same for a worker of a process pool, which else waits for work for ever."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    with suppress(OSError, ValueError):
        print("\nprac: the command that started this run has ended, so it ends too; see --resume.", file=sys.stderr)
    os._exit(143)  # whatever the main thread is at; what it was writing is not there, or not sealed
