"""What is noted of a compressed layer: how it was found, how it computes, what its neighbours share."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from prac.estimator import Estimator

if TYPE_CHECKING:
    from prac.layers.base import Compressed


@dataclass(frozen=True)
class Match:
    """A module that can be compressed, and how."""

    layer: type[Compressed]
    inputs: dict[str, int | None]  # the tensors it keeps, by name, and their widths where known
    facts: Any = None  # what its forward has to know, as its kind of layer takes it
    shareable: bool = False  # it keeps its own input, so its neighbours may read the same tensor
    grouped: type[Compressed] | None = None  # the layer to use where a norm shares its x̂ with those that read it


class Source(NamedTuple):
    """From what a layer's input can be had, so that it keeps none: whose tensor, and which."""

    name: str  # "" where it is torch's attention that keeps it
    what: str

    @property
    def is_there_anyway(self) -> bool:
        """Whether it costs nothing to keep it in full."""
        return not self.name


class Way(NamedTuple):
    """What decides, beside its tensors and children, what a module computes."""

    forward: Any  # of its class
    settings: dict[str, Any]  # its plain attributes, and its functions

    def differs(self, module: nn.Module, of_class: type[nn.Module]) -> str:
        """What is not as it was, or ""."""
        if of_class.forward is not self.forward:
            return "the forward of its class was replaced"
        now = vars(module)
        for name, value in self.settings.items():
            if now.get(name) != value:
                return f"its {name} was changed from {value} to {now.get(name)}"
        return ""


def way(module: nn.Module) -> Way:
    """The module's way of computing, to be compared with a later one."""
    plain: Any = bool | int | float | str | FunctionType | BuiltinFunctionType | functools.partial | type | None
    settings = {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, plain)
    }
    return Way(type(module).forward, settings)


@dataclass
class Shared:
    """What the layers of one model share."""

    said: set[str] = field(default_factory=set)  # the warnings given
    is_waiting: bool = False  # for a first batch, to see what shares an input
    trains: bool = False  # since the last optimizer step, in training mode
    evaluates: bool = False  # and in eval mode, with gradients

    def stepped(self) -> None:
        """An optimizer step was taken."""
        if self.evaluates and not self.trains:
            self.warn(
                "prac compresses nothing: the model is trained in eval mode, where every activation is kept in full. "
                "Call model.train() before training."
            )
        self.trains = self.evaluates = False

    def warn(self, text: str, name: str = "") -> None:
        """Once for a model, with the name of the layer where it was seen first."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(f"{name}: {text}" if name else text, stacklevel=3)


@dataclass
class Record:
    """All that prac notes on a module."""

    name: str  # the module's, when it was found
    match: Match
    original: type[nn.Module]
    estimators: dict[str, Estimator]  # one for each tensor the layer keeps
    source: Source | None  # where its input can be had from others
    way: Way
    parameter: str  # the name of its forward's first parameter
    shared: Shared
    stands_for: nn.Module | None = None  # the module in whose place this one is
    suspended: bool = False  # keep everything in full for a while
    due: int = 0  # the optimizer step at which it is to decide again how to keep, where it decides
    dtypes: dict[Any, torch.dtype] = field(default_factory=dict)  # of a norm's output, by what decides them
    keys_per_query: float = 1.0  # of attention, in its last training call
    departs: str = ""  # why its last training call was not as planned
