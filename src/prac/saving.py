"""The state of the compression in a folder: a file for each process, since each compresses its own tokens."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from prac import files
from prac.estimator import process


def save(state: dict[str, Any], folder: Path) -> None:
    """Write the state of this process into ``folder``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(folder / _name(process()), buffer.getvalue())


def load(folder: Path) -> dict[str, Any]:
    """The state of this process; for one that there was not when it was saved, the first one's, :func:`renewed`.

    Raises:
        FileNotFoundError: if there is none in ``folder``.
        ValueError: if it cannot be read.
    """
    own, first = folder / _name(process()), folder / _name(0)
    path = own if own.exists() else first
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no {first.name}: prac saved nothing there.") from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: restore it from a copy, or delete it and go on with new subspaces."
        ) from error
    return state if own.exists() else renewed(state)


def renewed(state: dict[str, Any]) -> dict[str, Any]:
    """The steps of a state without its subspaces, for another process: the noise of processes is to be independent.

    Those are then made in the next forward pass.
    """
    fresh = {"p": None, "q1_step": -1, "q2_step": -1}
    return state | {"subspaces": {name: subspace | fresh for name, subspace in state["subspaces"].items()}}


def _name(number: int) -> str:
    return "prac.pt" if number == 0 else f"prac-{number}.pt"
