"""Checkpoints of a run: sealed once they are whole, checked before they are used.

The ``Trainer`` writes a checkpoint file by file. The seal comes last: a list of all files with their lengths and
SHA-256. What has none was cut short (the process was killed, the disk was full) and is passed over; what does not
match its seal was damaged later, and is refused.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from prac import files
from prac.integrations.transformers import checkpoint_folder
from prac.lab import results

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from prac.handle import Handle

SEAL = "sealed.json"


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run folder that was written whole."""
    return max(_sealed(out), key=step, default=None)


def step(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _sealed(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if (path / SEAL).exists()]


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
    """Adds the compression state to each checkpoint, and then the seal."""

    def __init__(self, handle: Handle | None) -> None:
        self.handle = handle

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every process writes its state; when all have, the first one seals."""
        checkpoint = checkpoint_folder(args, state)
        if not checkpoint.exists():
            return  # it could not be written
        try:
            if self.handle is not None:
                self.handle.save(checkpoint)
            if args.world_size > 1:
                torch.distributed.barrier()
            if args.process_index == 0:
                _seal(checkpoint, args.world_size)
        except OSError as error:
            give_up(checkpoint, error, args)


def give_up(checkpoint: Path, error: Exception, args: TrainingArguments) -> None:
    """Remove what there is of a checkpoint, to make room, and say so."""
    if args.world_size > 1:
        raise error
    shutil.rmtree(checkpoint, ignore_errors=True)
    print(
        f"\nprac: {checkpoint.name} could not be written and is left out, training goes on: "
        f"{' '.join(str(error).split())[:200]}. Make room on the disk before the next one.",
        file=sys.stderr,
    )
