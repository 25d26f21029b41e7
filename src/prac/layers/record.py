"""What is noted of a compressed layer: how it was found, how it computes, what its neighbours share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from prac.estimators.base import Estimator
from prac.layers.way import Way
from prac.runtime.warn import warn

if TYPE_CHECKING:
    from prac.layers.base import Compressed


Keeps = Literal["as planned", "nothing", "in full", "its own"]  # its own, where it was to have its input from others


@dataclass(frozen=True)
class Match:
    """A module that can be compressed, and how."""

    layer: type[Compressed]
    inputs: dict[str, int | None]  # the tensors it keeps, by name, and their widths where known
    facts: Any = None  # what its forward has to know, as its kind of layer takes it
    shareable: bool = False  # it keeps its own input, so its neighbours may read the same tensor
    grouped: type[Compressed] | None = None  # the layer to use where a norm shares its x̂ with those that read it


MAKER = "the operation that made it"


class Source(NamedTuple):
    """From what a layer's input can be had, so that it keeps none: whose tensor, and which."""

    name: str  # "" where operations between modules keep it, such as torch's attention
    what: str

    @property
    def is_there_anyway(self) -> bool:
        """Whether it costs nothing to keep it in full."""
        return not self.name


@dataclass
class Shared:
    """What the layers of one model share."""

    said: set[str] = field(default_factory=set)  # the warnings given
    is_waiting: bool = False  # for a first batch, to see what shares an input
    is_watched: bool = False  # in its first step, in which every layer is to be seen
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

    def warn(self, text: str, name: str = "", why: str = "") -> None:
        """Once for a model and reason, with the name of the layer where it was seen first."""
        if (why or text) not in self.said:
            self.said.add(why or text)
            warn(f"{name}: {text}" if name else text)


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
    calls: int = 1  # in one forward pass of the model
    kept_anyway: bool = False  # what it reads is kept in full by something else
    suspended: bool = False  # keep everything in full for a while
    due: int = 0  # the optimizer step at which it is to decide again how to keep, where it decides
    dtypes: dict[Any, torch.dtype] = field(default_factory=dict)  # of a norm's output, by what decides them
    reads: torch.dtype | None = None  # of its input in that call, as autocast has it
    keys_per_query: float = 1.0  # of attention, in its last training call
    departs: str = ""  # why its last training call was not as planned, and what it kept then
    keeps: Keeps = "as planned"
    unused: tuple[str, ...] = ()  # of the tensors that it keeps, those that nobody needed then
    tries: int = 0  # how often it was tried again since something changed
    refused: tuple[str, ...] = ()  # changes with which it does not compute what it did

    def begin(self, reads: torch.dtype | None) -> None:
        """A training call begins, as planned until something else is noted."""
        self.reads = reads
        self.departs, self.keeps, self.unused, self.shared.trains = "", "as planned", (), True
