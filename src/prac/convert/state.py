"""The state of the compression, and how it lies in a folder: a file a process, since each compresses its own tokens."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prac.estimators.base import Estimator
from prac.estimators.clock import Clock
from prac.estimators.subspace import subspaces_among
from prac.layers import Compressed, layers_of
from prac.runtime import files
from prac.runtime.processes import process


def state_of(model: nn.Module, clock: Clock) -> dict[str, Any]:
    """The step, which estimator each layer uses, and every subspace; plain containers, numbers and tensors."""
    layers = layers_of(model)
    return {
        "step": clock.step,
        "shared": {n: {t: e.name for t, e in layer.estimators.items()} for n, layer in layers.items()},
        "subspaces": {e.name: e.state_dict() for e in subspaces_among(_estimators(layers))},
    }


def take_up(state: dict[str, Any], model: nn.Module, clock: Clock) -> None:
    """Give ``model`` a saved state.

    Raises:
        ValueError: if it is of another model or config; the message says what differs.
    """
    layers = layers_of(model)
    if missing := sorted({"step", "shared", "subspaces"} - set(state)):
        raise ValueError(
            f"this is no state of prac: it lacks {', '.join(missing)}; give what handle.state_dict() gave."
        )
    if set(state["shared"]) != set(layers):
        odd = sorted(set(state["shared"]) ^ set(layers))
        raise ValueError(f"the saved state is of other layers than this model's: {', '.join(odd[:5])}.")
    by_name = {e.name: e for e in _estimators(layers)}
    leaders = {name for tensors in state["shared"].values() for name in tensors.values()}
    if missing := sorted((set(state["subspaces"]) | leaders) - set(by_name)):
        raise ValueError(f"the saved state has subspaces that this model lacks: {', '.join(missing[:5])}.")
    if missing := sorted({s.name for s in subspaces_among(by_name.values())} & leaders - set(state["subspaces"])):
        raise ValueError(
            f"the saved state is of another config: it has no subspace of {', '.join(missing[:5])}. Compress as the "
            "saved run was."
        )
    for name, layer in layers.items():
        layer.estimators = {tensor: by_name[leader] for tensor, leader in state["shared"][name].items()}
    for subspace in subspaces_among(_estimators(layers)):
        subspace.load_state_dict(state["subspaces"][subspace.name])
    clock.step = state["step"]


def subspaces_of(model: nn.Module) -> list[Tensor]:
    """Every P, which exists once however large the batch."""
    return [s.p_NR for s in subspaces_among(_estimators(layers_of(model))) if s.p_NR is not None]


def _estimators(layers: dict[str, Compressed]) -> Iterator[Estimator]:
    yield from dict.fromkeys(e for layer in layers.values() for e in layer.estimators.values())


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
