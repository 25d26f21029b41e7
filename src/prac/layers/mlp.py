"""MLPs, ``down(f(gate(x)) * up(x))`` and ``down(f(up(x)))``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.layers.base import Compressed, is_hooked, trained
from prac.layers.linear import Linear
from prac.layers.marks import mark, source_of
from prac.layers.way import Difference, Way
from prac.ops import Activation, Normed, activation, glu, norm_mlp, recomputed, recomputed_product
from prac.runtime.autocast import autocast_dtype


class Roles(NamedTuple):
    """The names of an MLP's children by what they do; "" for none."""

    into: tuple[str, ...]  # gate and up; one layer for both, or up alone
    down: str
    function: Activation
    gated: bool
    gate_first: bool = True  # where one layer gives both, whether the gate is its first half
    original: str = ""  # the child that computes the function; "" where the module calls torch's
    dropout: str = ""  # a dropout after down


class Facts(NamedTuple):
    """What an MLP's forward has to know: who does what, and how its other children computed when it was found."""

    roles: Roles
    ways: dict[str, Way]


class MLP(Compressed):
    """Behind a norm that shares its x̂, one operation from there to the output; else the product alone.

    The one operation keeps g and u (or a) and computes f(g) u again. Otherwise the linear layers are
    compressed as such, and what changes hands is the product in between, without keeping f(g).
    """

    kind: ClassVar[Kind] = "activation"
    in_full: ClassVar[str] = "what lies between its layers stays in full"

    def _differences(self) -> Iterator[Difference]:
        """As for any layer; its activation, dropouts and what else does nothing are its own business too."""
        facts = self._prac.match.facts
        for name, then in facts.ways.items():
            child = self._modules.get(name)
            if child is None or "forward" in vars(child) or then.is_replaced(type(child)):
                yield Difference(f"its {name} was changed", True)
            elif name != facts.roles.dropout and is_hooked(child):  # what they do has no derivative here
                yield Difference(f"its {name} has hooks", True)
            elif name != facts.roles.dropout:  # which is called, with the probability that it has then
                found = then.differences(child, type(child))
                yield from (Difference(f"its {name} was changed ({text})", called) for text, called in found)
        yield from super()._differences()

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        roles, source = self._prac.match.facts.roles, source_of(x)
        if isinstance(source, Normed) and self._runs_as_one():
            return self._from_norm(x, source)
        h = self._gated(x) if roles.gated else self._activated(x)
        return self._drop(self.get_submodule(roles.down)(h))

    def _runs_as_one(self) -> bool:
        """Whether nobody would miss the calls of its children."""
        if self._prac.shared.is_watched:
            return False
        roles = self._prac.match.facts.roles
        linears = [self.get_submodule(name) for name in (*roles.into, roles.down)]
        ours = all(isinstance(layer, Linear) and layer.is_plain() for layer in linears)
        alone = not any(
            is_hooked(child) or "forward" in vars(child) or type(child).__call__ is not nn.Module.__call__
            for child in self.children()
        )
        return self.estimators["gate"].complete and ours and alone

    def _parameters_ON(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        layer = self.get_submodule(name)
        assert isinstance(layer, Linear)
        layer._prac.begin(dtype)  # whatever it did when it was called itself
        return layer.parameters_ON()

    def _from_norm(self, x: Tensor, normed: Normed) -> Tensor:
        roles, dtype = self._prac.match.facts.roles, autocast_dtype(x)
        into, down = [self._parameters_ON(name, dtype) for name in roles.into], self._parameters_ON(roles.down, dtype)
        keep = [self.estimators[name] for name in (("gate", "up") if roles.gated else ("gate",))]
        y = norm_mlp(x, normed, into, down, roles.function.name, keep, gate_first=roles.gate_first)
        return self._drop(y)

    def _drop(self, y: Tensor) -> Tensor:
        dropout = self._prac.match.facts.roles.dropout
        return self.get_submodule(dropout)(y) if dropout else y

    def _gated(self, x: Tensor) -> Tensor:
        """``f(g) * u``, (..., m)."""
        roles = self._prac.match.facts.roles
        g, u = gate_and_up(self, roles, x)
        gate, up, f = self.estimators["gate"], self.estimators["up"], function_in(self, roles)
        needs_u = g.requires_grad or trained(*self.get_submodule(roles.down).parameters())
        self._prac.unused = () if needs_u else ("up",)
        if not trained(g, u):  # only now known, and asking computes them
            self.keep_nothing()
            return f(g) * u
        h = glu(g, u, roles.function, gate, up, compute=f)
        return mark(h, recomputed_product(gate.keep(g), up.keep(u), roles.function)) if self._is_rounded() else h

    def _activated(self, x: Tensor) -> Tensor:
        """``f(a)``, (..., m)."""
        roles = self._prac.match.facts.roles
        a, gate, f = self.get_submodule(roles.into[0])(x), self.estimators["gate"], function_in(self, roles)
        if not trained(a):
            self.keep_nothing()
            return f(a)
        h = activation(a, roles.function, gate, compute=f)
        return mark(h, recomputed(gate.keep(a), roles.function)) if self._is_rounded() else h

    def _is_rounded(self) -> bool:
        """Whether from what is kept the output can be had again, as a linear layer needs it."""
        return all(estimator.complete for estimator in self.estimators.values())


def function_in(module: nn.Module, roles: Roles) -> Callable[[Tensor], Tensor]:
    """Its activation: the child, unless that would overwrite what is to be kept."""
    original = module.get_submodule(roles.original) if roles.original else None
    return roles.function.forward if original is None or getattr(original, "inplace", False) else original


def gate_and_up(module: nn.Module, roles: Roles, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gate g and the other factor u of a gated MLP, (..., m) each."""
    if len(roles.into) == 1:
        first, second = module.get_submodule(roles.into[0])(x).chunk(2, dim=-1)
        return (first, second) if roles.gate_first else (second, first)
    g, u = (module.get_submodule(name)(x) for name in roles.into)
    return g, u
