"""The weights of a run for whoever uses the model next: a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prac.runtime import files

MODEL = "model"  # in the folder of a run
# What the libraries below raise where a file cannot be written.
FAILURES = (OSError, SafetensorError)


def save(model: Any, tokenizer: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write weights and tokenizer to ``folder``, whole or not at all, in the dtype they were trained in.

    Args:
        model: of transformers, or adapters of peft, which are then all that is written.
        tokenizer: that goes with it.
        folder: replaced if it exists.
        state: the state dict, where the model holds no more than a shard of it.

    Raises:
        RuntimeError: if it cannot be written; what was in ``folder`` is still there.
    """

    def fill(target: Path) -> None:
        how = {} if state is None else {"state_dict": state}
        model.save_pretrained(target, **how)
        tokenizer.save_pretrained(target)

    try:
        files.replace_folder(folder, fill)
    except FAILURES as error:
        raise RuntimeError(
            f"{folder} could not be written ({reason(error)}); the weights are in the last checkpoint beside it. Make "
            "room or choose another disk, then --resume."
        ) from error


def rescue(model: Any, tokenizer: Any, checkpoint: Path) -> Path | None:
    """Put the weights of a checkpoint that could not be written wherever there is room; returns the place, if any."""
    run = checkpoint.parent
    with suppress(RuntimeError):
        save(model, tokenizer, run / MODEL)
        return run / MODEL
    with suppress(OSError):
        elsewhere = Path(tempfile.mkdtemp(prefix=f"prac-{run.resolve().name}-{checkpoint.name}-"))
        try:
            save(model, tokenizer, elsewhere / MODEL)
            return elsewhere / MODEL
        except RuntimeError:
            elsewhere.rmdir()
    return None


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(str(error).split())[:200]
