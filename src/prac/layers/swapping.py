"""Turning a module into a compressed one in place, and back."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import nn

from prac.estimators.base import Estimator
from prac.layers.record import Match, Record, Shared, Source
from prac.layers.way import of_forward, way

if TYPE_CHECKING:
    from prac.layers.base import Compressed

_swapped: dict[tuple[type[Compressed], type[nn.Module]], type[nn.Module]] = {}


def swap(
    module: nn.Module,
    match: Match,
    estimators: dict[str, Estimator],
    *,
    name: str = "",
    source: Source | None = None,
    shared: Shared | None = None,
) -> None:
    """Turn ``module`` into a compressed one, in place."""
    original = type(module)
    key = (match.layer, original)
    if key not in _swapped:
        hidden = torch.compiler.disable(match.layer._in_training, reason="prac keeps activations outside of graphs")
        _swapped[key] = type(
            f"Prac{original.__name__}", key, {"__module__": original.__module__, "_outside_graphs": hidden}
        )
    parameter = next(iter(list(inspect.signature(original.forward).parameters)[1:]), "")
    noted = of_forward(original) if match.layer.kind in ("linear", "attention") else way(module)
    record = Record(name, match, original, estimators, source, noted, parameter, shared or Shared())
    module.__class__ = _swapped[key]
    module._prac = record  # type: ignore[assignment]


def unswap(module: nn.Module) -> Record:
    """The inverse of :func:`swap`; also where others have put a class of their own in front since."""
    record: Record = vars(module).pop("_prac")
    module.__class__ = _without(type(module), _swapped[record.match.layer, record.original], record.original)
    return record


def _without(of_class: type, swapped: type, original: type[nn.Module]) -> type[nn.Module]:
    if of_class is swapped:
        return original
    if swapped not in of_class.__mro__:
        return of_class
    bases = tuple(_without(base, swapped, original) for base in of_class.__bases__)
    if any("__class__" in f.__code__.co_freevars for f in vars(of_class).values() if isinstance(f, FunctionType)):
        of_class.__bases__ = bases  # its methods call super(), which in a copy of the class would be another's
        return of_class
    inside = {name: value for name, value in vars(of_class).items() if name not in ("__dict__", "__weakref__")}
    return type(of_class.__name__.replace(swapped.__name__, original.__name__), bases, inside)


def without_prac(module: nn.Module) -> nn.Module:
    """A module of the same parameters and attributes, without prac's layers in it."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["_modules"] = {
        name: None if child is None else without_prac(child) for name, child in module._modules.items()
    }
    if "_prac" in vars(twin):
        twin.__class__ = vars(twin).pop("_prac").original
    return twin
