"""A row for each thing measured: made in a process of its own, and kept in a file from then on.

A process each, so that a row that runs out of memory, crashes the device or is killed takes no other along. They are
forked from a server that has imported everything and never touched the GPU: a row starts in a moment. Where a driver
does not bear that, each starts from nothing.

Every row says what was measured (``setting``), on which ``device`` with which ``torch``, what it was ``made_by``, its
``outcome`` (one of :data:`OUTCOMES`) and, unless that is ``measured``, a ``reason``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from prac.lab.commands.bench import device_name
from prac.lab.report import results
from prac.runtime import files

Row = dict[str, Any]
# "unfinished": what a row had when everything was stopped; it is measured again. "left out": see its job.
OUTCOMES = ("measured", "out of memory", "failed", "stopped", "unfinished", "left out")
BAD = ("failed", "stopped")  # running out of memory is what was to be found out
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "prac.lab.measured.block"]
AS_TORCH_CHOOSES, FLASH = "as torch chooses", "flash"


@dataclass(frozen=True)
class Job:
    """A row to be measured.

    Args:
        name: what people call it.
        measure: called as ``measure(setting, device, **arguments)`` in the row's process; yields fields of the row, as
            often as there is something new. A function of a module, so that another process finds it.
        setting: plain data that decides what is measured; a row that has the same is not measured again.
        estimate_s: how long that takes, or some more.
        arguments: what else it takes.
        left_out: why it cannot be measured here; empty if it can.
    """

    name: str
    measure: Callable[..., Iterator[Row]]
    setting: Row
    estimate_s: float
    arguments: Row = field(default_factory=dict)
    left_out: str = ""


class Sheet:
    """The rows of a stage in a JSON file, which is written whole after each change.

    Raises:
        ValueError: if the file is there and has no such rows.
    """

    def __init__(self, path: Path, command: str, device: str) -> None:
        self.path, self.command = path, command
        self.about = {"device": device, "torch": torch.__version__}
        document = results.read(path) if path.exists() else {"rows": []}
        if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
            raise ValueError(f"{path} has no rows of benchmarks/gpu: give --out another folder, or move it away.")
        self.rows: list[Row] = document["rows"]

    def find(self, job: Job) -> Row | None:
        """The row of a job on this device with this torch, if there is one."""
        return next((row for row in self.rows if self._same(row, job)), None)

    def put(self, job: Job, found: Row) -> None:
        """Write the row of a job, in the place of the one that was there."""
        row = {"name": job.name, "setting": job.setting, **self.about, "made_by": self.command, **found}
        at = next((i for i, old in enumerate(self.rows) if self._same(old, job)), len(self.rows))
        self.rows[at : at + 1] = [row]
        files.write_json(self.path, results.document(self.command, self.rows))

    def _same(self, row: Row, job: Job) -> bool:
        mine = json.loads(json.dumps(job.setting))  # as it is after a trip through the file
        return row.get("setting") == mine and {key: row.get(key) for key in self.about} == self.about


def measured(context: Any, job: Job, device: str, seconds: float) -> Iterator[Row]:
    """The row of a job as far as it is known, each time that its process says more; the last has its outcome."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, job.measure, job.setting, device, job.arguments))
    begun = time.monotonic()
    process.start()
    sender.close()
    row: Row = {"outcome": "unfinished", "reason": "everything was stopped while it was measured"}
    try:
        while row["outcome"] == "unfinished":
            if not receiver.poll(max(0.0, begun + seconds - time.monotonic())):
                end = {"outcome": "stopped", "reason": f"not over after {seconds:.0f} s, when --limit-s was over"}
            else:
                try:
                    end = receiver.recv()
                except EOFError:
                    process.join()
                    end = {"outcome": "failed", "reason": f"its process ended with {process.exitcode}"}
            row |= end | {"wall_s": round(time.monotonic() - begun, 1)}
            yield dict(row)
    finally:
        receiver.close()
        if row["outcome"] == "measured":
            process.join(10)
        process.kill()
        process.join()


def _serve(sender: Connection, measure: Callable[..., Iterator[Row]], setting: Row, device: str, more: Row) -> None:
    """What the process of a row does."""
    try:
        for found in measure(setting, device, **more):
            sender.send(found)
        sender.send({"outcome": "measured", "reason": ""})
    except Exception as error:  # of torch, of Triton, of whatever a row tries
        if _out_of_memory(error):
            sender.send({"outcome": "out of memory", "reason": _line(error)})
            return
        traceback.print_exc(limit=-3)
        sender.send({"outcome": "failed", "reason": f"{type(error).__name__}: {_line(error)}"})


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether that is why, also where somebody raised another error from it."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _out_of_memory(error.__cause__))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def processes(device: str) -> tuple[Any, str]:
    """How to start the processes of rows, and the name of the device."""
    # Else asking whether there is a GPU touches it, and no process forked from one that has may use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    if device == "cpu":
        return context, device_name(torch.device("cpu"))
    ways, reasons = (context, multiprocessing.get_context("spawn")), []
    for context in ways:
        # The GPU is asked in a process of its own: this one would hold some of its memory until the end.
        *_, answer = measured(context, Job("device", _device, {}, 60), device, 120)
        if answer["outcome"] == "measured":
            return context, answer["device"]
        reasons.append(answer["reason"])
    raise OSError(f"torch sees a CUDA GPU and cannot use it: {'; '.join(reasons)}.")


def _device(setting: Row, device: str) -> Iterator[Row]:
    torch.ones(1, device=device).item()
    yield {"device": device_name(torch.device(device))}


def attention(kind: str) -> AbstractContextManager[None]:
    """Runs attention as torch chooses, or by its flash kernel wherever that can be."""
    if kind == AS_TORCH_CHOOSES:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
