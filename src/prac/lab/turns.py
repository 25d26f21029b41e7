"""Runs that take turns, a few steps each: what slows the machine for a while then slows all of them alike."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from prac.lab.callbacks import Metrics

# In a run's environment, FD:STEPS. Over the socket, a byte gives the turn to the run, and a byte gives it back.
VARIABLE = "PRAC_TURNS"


def take_turns(commands: Sequence[Sequence[str]], steps: int) -> list[int]:
    """Run ``prac ARGV…`` for each of ``commands`` in a process of its own; all are there, one at a time is at work.

    A process starts with its first turn, trains ``steps`` optimizer steps in each, and evaluates in its last.

    Returns:
        Their exit codes.
    """
    runs = [_Run(argv, steps) for argv in commands]
    waiting = deque(runs)
    try:
        while waiting:
            run = waiting.popleft()
            if run.turn():
                waiting.append(run)
        return [run.code for run in runs]
    finally:
        for run in runs:
            run.close()


class _Run:
    """A process and our end of its socket."""

    def __init__(self, argv: Sequence[str], steps: int) -> None:
        self.argv = argv
        self.steps = steps
        self.socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def turn(self) -> bool:
        """Let it work until it has had its turn; returns whether it wants another one."""
        if self.socket is None or self.process is None:
            self.socket, theirs = socket.socketpair()
            with theirs:
                environment = os.environ | {VARIABLE: f"{theirs.fileno()}:{self.steps}"}
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "prac", *self.argv], env=environment, pass_fds=[theirs.fileno()]
                )
        try:
            self.socket.sendall(b"\n")
            while not select.select([self.socket], [], [], 1)[0]:
                if self.process.poll() is not None:  # and a child of its own holds the socket open
                    return False
            again = bool(self.socket.recv(1))
        except ConnectionError:  # killed while it waited
            again = False
        if not again:
            self.process.wait()
        return again

    @property
    def code(self) -> int:
        """Its exit code."""
        assert self.process is not None and self.process.returncode is not None
        return self.process.returncode

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.socket is not None:
            self.socket.close()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


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
