"""Runs that take turns, a few steps each: what slows the machine for a while then slows all of them alike."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from prac.lab.runs import children

if TYPE_CHECKING:
    from subprocess import Popen

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from prac.lab.runs.callbacks import Metrics

# In a run's environment, FD:STEPS. Over the socket, a byte gives the turn to the run, and a byte gives it back.
VARIABLE = "PRAC_TURNS"


def take_turns(commands: Sequence[Sequence[str]], steps: int) -> list[int]:
    """Run ``prac ARGV…`` for each of ``commands`` in a process of its own; all are there, one at a time is at work.

    A process starts with its first turn, trains ``steps`` optimizer steps in each, and evaluates in its last.

    Returns:
        Their exit codes.
    """
    runs = [_run(argv, steps) for argv in commands]
    codes = [0] * len(runs)
    waiting = deque(enumerate(runs))
    try:
        while waiting:
            index, run = waiting.popleft()
            try:
                next(run)
                waiting.append((index, run))
            except StopIteration as end:
                codes[index] = end.value
        return codes
    finally:
        for run in runs:
            run.close()


def _run(argv: Sequence[str], steps: int) -> Generator[None, None, int]:
    """One run, turn by turn; returns its exit code. Closed early, it ends the process."""
    ours, theirs = socket.socketpair()
    with ours, ExitStack() as ends:
        with theirs:
            turns = {VARIABLE: f"{theirs.fileno()}:{steps}"}
            process = ends.enter_context(children.started(argv, turns, pass_fds=[theirs.fileno()]))
        while _turn(ours, process):
            yield
        return process.wait()


def _turn(ours: socket.socket, process: Popen[bytes]) -> bool:
    """Let it work until it has had its turn; returns whether it wants another one."""
    try:
        ours.sendall(b"\n")
        while not select.select([ours], [], [], 1)[0]:
            if process.poll() is not None:  # and a child of its own holds the socket open
                return False
        return bool(ours.recv(1))
    except ConnectionError:  # killed while it waited
        return False


class Turns(TrainerCallback):
    """In such a run: gives its turn back after so many steps and waits for the next one, off the clock."""

    def __init__(self, own: socket.socket, steps: int, metrics: Metrics) -> None:
        self.socket = own
        self.steps = steps
        self.metrics = metrics
        self._wait()

    @classmethod
    def wanted(cls, metrics: Metrics) -> list[Turns]:
        """The callback, if this process is to take turns."""
        if VARIABLE not in os.environ:
            return []
        descriptor, steps = map(int, os.environ[VARIABLE].split(":"))
        return [cls(socket.socket(fileno=descriptor), steps, metrics)]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the turn back, when it is time."""
        if state.global_step % self.steps or state.global_step >= state.max_steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is in flight is training
        started = time.perf_counter()
        self._wait(given=b"\n")
        self.metrics.leave_out(time.perf_counter() - started)

    def _wait(self, given: bytes = b"") -> None:
        try:
            self.socket.sendall(given)
            turn = self.socket.recv(1)
        except ConnectionError:
            turn = b""
        if not turn:
            raise RuntimeError("the command that gives turns to this run has ended: go on with --resume.")
