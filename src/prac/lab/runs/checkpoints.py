"""Checkpoints of a run: sealed once they are whole, checked before they are used.

The ``Trainer`` writes a checkpoint file by file. The seal comes last: a list of all files with their lengths and
SHA-256. What has none was cut short (the process was killed) and is passed over; what does not match its seal was
damaged later, and is refused.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from prac.integrations.transformers import checkpoint_folder
from prac.lab.materials import weights
from prac.lab.report import results
from prac.runtime import files

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from prac.convert.handle import Handle

SEAL = "sealed.json"
NAME = re.compile(r"checkpoint-\d+")
KEPT = 2  # should the newer one be damaged later


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run folder that was written whole."""
    return next(reversed(_sealed(out)), None)


def step(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def all_in(out: Path) -> list[Path]:
    """Those of a run folder, whole or not, oldest first; a copy that somebody named otherwise is none of them."""
    return sorted((path for path in out.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step)


def _sealed(out: Path) -> list[Path]:
    return [path for path in all_in(out) if (path / SEAL).exists()]


def check(checkpoint: Path) -> None:
    """Compare a checkpoint with its seal.

    Raises:
        ValueError: if a file is missing or is not what was written; the message says what to do.
    """
    try:
        sealed: dict[str, dict[str, Any]] = results.read(checkpoint / SEAL)["files"]
        wrong = next((problem for name, entry in sealed.items() if (problem := _problem(checkpoint, name, entry))), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        wrong = f"{SEAL} cannot be read"
    if wrong:
        older = [path for path in _sealed(checkpoint.parent) if step(path) < step(checkpoint)]
        before = max(older, key=step, default=None)
        then = f"go on from {before.name}" if before else "start over with --overwrite, since there is no older one"
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Restore it from a copy, or delete this folder and {then}.")


def _problem(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name} has {size:,} of {entry['bytes']:,} bytes"
    return None if _digest(path) == entry["sha256"] else f"{name} is not what was written"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(checkpoint: Path, processes: int) -> None:
    written = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    entries = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in written
    }
    files.write_json(checkpoint / SEAL, {"processes": processes, "files": entries})


# --- while training ------------------------------------------------------------------------------


class Seal(TrainerCallback):
    """Adds the compression state to each checkpoint, then the seal; then the oldest ones go."""

    def __init__(self, handle: Handle | None) -> None:
        self.handle = handle

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kept: Any) -> None:
        """Every process writes its state; when all have, the first one seals."""
        checkpoint = checkpoint_folder(args, state)
        with whole(checkpoint, args, kept["model"], kept["processing_class"]):
            if self.handle is not None:
                self.handle.save(checkpoint)
            if args.world_size > 1:
                torch.distributed.barrier()
            if args.process_index == 0:
                _seal(checkpoint, args.world_size)
                for old in _sealed(checkpoint.parent)[:-KEPT]:
                    shutil.rmtree(old)


@contextmanager
def whole(checkpoint: Path, args: TrainingArguments, model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """End training where a checkpoint cannot be written: what there is of it goes, its weights are put elsewhere.

    Raises:
        RuntimeError: says what is lost, where the weights are, and what to do.
    """
    try:
        yield
    except (*weights.FAILURES, RuntimeError) as error:
        # A RuntimeError is what torch.save raises where the disk is full.
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise ended(checkpoint, error, checkpoint, args, model, tokenizer) from error


def ended(
    what: Path, error: Exception, checkpoint: Path, args: TrainingArguments, model: nn.Module, tokenizer: Any
) -> RuntimeError:
    """Training ends since ``what`` cannot be written: save what can be saved, and say what it is and what is lost."""
    place = weights.rescue(model, tokenizer, checkpoint) if args.world_size == 1 else None
    saved = "Its weights are lost" if place is None else f"Its weights, without the optimizer, are in {place}"
    before = newest(checkpoint.parent)
    onward = "start over" if before is None else f"go on from {before.name}"
    return RuntimeError(
        f"{what} could not be written ({weights.reason(error)}), so training ends at step {step(checkpoint)}. {saved}. "
        f"Make room on the disk; --resume will then {onward}."
    )
