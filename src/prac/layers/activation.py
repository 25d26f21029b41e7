"""GELU and SiLU modules, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.layers.alike import distances
from prac.layers.base import Compressed, trained
from prac.layers.marks import mark
from prac.layers.record import Match
from prac.layers.way import Difference
from prac.ops import ACTIVATIONS, Activation, activation, recomputed
from prac.runtime.fake import with_numbers


class ElementWise(Compressed):
    """Keeps Z = X P, or X in few bits, in place of X (and of whatever the original's formula keeps).

    From few bits the output can be had again, so that a linear layer which reads it keeps nothing. From a
    projection it could not: that would be a bias in the weight's gradient.
    """

    kind: ClassVar[Kind] = "activation"

    def _differences(self) -> Iterator[Difference]:
        """As for any layer; also of the module in whose place it is, which somebody may hold."""
        yield from super()._differences()
        yield from self._of_the_other()

    def _of_the_other(self) -> Iterator[Difference]:
        other, way = self._prac.stands_for, self._prac.way
        if other is None or way.is_copied:
            return
        if "forward" in vars(other) or any(way.differences(other, type(other))):
            yield Difference("the module that it is a copy of was changed", True)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        other = self._prac.stands_for
        if other is None or torch.compiler.is_compiling() or not any(self._of_the_other()):
            return super()._original(*args, **kwargs)
        return other.forward(*args, **kwargs)

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., m) to (..., m)."""
        if not trained(x):
            return self._idle(x)
        estimator, function = self.estimators["x"], self._prac.match.facts
        h = activation(x, function, estimator, compute=self._original)
        return mark(h, recomputed(estimator.keep(x), function)) if estimator.complete else h


def function_of(module: nn.Module, device: torch.device | None = None) -> Activation | None:
    """Which known activation a module computes in both modes, found by evaluating it on a grid.

    Args:
        module: without parameters, buffers or children; others are none.
        device: where the model lives that it is part of; the CPU by default.
    """
    if any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
        return None
    with with_numbers(module):
        x = torch.linspace(-6, 6, 97, device="cpu", dtype=torch.float32).to(device or "cpu")
        functions = list(ACTIVATIONS.values())
        apart = distances(module, [function.forward for function in functions], x)
    return functions[apart.index(min(apart))] if min(apart) < 1e-5 else None


def recognise(module: nn.Module, device: torch.device | None = None) -> Match | str | None:
    """A GELU or SiLU by its name, then by its values."""
    name = type(module).__name__.lower()
    if not any(word in name for word in ("gelu", "silu", "swish")) or any(module.children()):
        return None
    if getattr(module, "inplace", False):
        return "an activation that overwrites its input"
    function = function_of(module, device)
    if function is None:
        return "an activation, but its values are not those of GELU (exact or tanh) or SiLU"
    # Its width is that of whatever comes along.
    return Match(ElementWise, {"x": None}, function)
