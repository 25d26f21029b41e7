"""Gated MLPs, ``down(f(gate(x)) * up(x))``, found by evaluating them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.layers.activation import function_of
from prac.layers.base import Compressed, Match
from prac.ops import ACTIVATIONS, Activation, glu
from prac.structure import in_mode

# How a module's children make up a gated MLP: the names of gate, up and down; with gate and
# up in one linear layer, gate and up are the same name and the order of its halves follows.
Roles = tuple[str, str, str]


class GatedMLP(Compressed):
    """Runs the gated product as one op, which keeps compressed g and u and not f(g).

    Its linear layers are compressed as such. Only the product in between changes hands.
    """

    kind: ClassVar[Kind] = "activation"
    _roles: Roles
    _function: Activation
    _gate_first: bool
    _original: str  # the child that computes the function, "" where the module calls torch's

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        # Only g and u can say whether they need gradients, and asking computes them.
        if not (self.training and torch.is_grad_enabled()):
            y: Tensor = super().forward(x)
            return y
        g, u = _gate_and_up(self, self._roles, self._gate_first, x)
        down = self.get_submodule(self._roles[2])
        f = self.get_submodule(self._original) if self._original else self._function.forward
        if self._compresses(g, u):
            h = glu(g, u, self._function, self.subspaces["gate"], self.subspaces["up"], compute=f)
        else:
            h = f(g) * u
        y = down(h)
        return y


def _gate_and_up(module: nn.Module, roles: Roles, gate_first: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, _ = roles
    if gate == up:
        first, second = module.get_submodule(gate)(x).chunk(2, dim=-1)
        return (first, second) if gate_first else (second, first)
    return module.get_submodule(gate)(x), module.get_submodule(up)(x)


def recognise(module: nn.Module) -> Match | str | None:
    """A module whose children could make up a gated MLP, if it computes what one would.

    Two or three linear layers (or wrappers of them, such as PEFT's), at most one activation
    and no active dropout. Each way to assign the roles is tried on random input against the
    module itself, so neither names nor classes matter.
    """
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if hasattr(child, "in_features")}
    others = [name for name, child in children.items() if name not in linears and not _is_idle(child)]
    if len(linears) not in (2, 3) or len(others) > 1:
        return None
    original = others[0] if others else ""
    functions = [function_of(children[original])] if original else list(ACTIVATIONS.values())
    found = [
        Match(
            GatedMLP,
            {"gate": width, "up": width},
            {"_roles": roles, "_function": f, "_gate_first": gate_first, "_original": original},
        )
        for roles, width in _assignments(linears)
        for f in functions
        for gate_first in ((True, False) if roles[0] == roles[1] else (True,))
        if f is not None and _computes(module, roles, children[original] if original else f.forward, gate_first)
    ]
    if len(found) > 1:  # with weights of zero, gate and up cannot be told apart
        return "a gated MLP, but its weights do not tell the gate from the other factor; compress after initialising it"
    return found[0] if found else None


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _assignments(linears: dict[str, nn.Module]) -> Iterator[tuple[Roles, int]]:
    shape = {name: (_width(m, "in_features"), _width(m, "out_features")) for name, m in linears.items()}
    if len(shape) == 3:
        for gate, up, down in itertools.permutations(shape):
            (n, m) = shape[gate]
            if shape[up] == (n, m) and shape[down][0] == m:
                yield (gate, up, down), m
    else:
        for gate_up, down in itertools.permutations(shape):
            m = shape[down][0]
            if shape[gate_up][1] == 2 * m:
                yield (gate_up, gate_up, down), m


def _width(linear: nn.Module, attribute: str) -> int:
    width: int = getattr(linear, attribute)
    return width


@torch.no_grad()
def _computes(module: nn.Module, roles: Roles, f: Callable[[Tensor], Tensor], gate_first: bool) -> bool:
    """Whether the module is this gated MLP, to the bit, on two random tokens."""
    parameter = next(module.get_submodule(roles[0]).parameters())
    if parameter.is_meta:
        return False
    n = _width(module.get_submodule(roles[0]), "in_features")
    x = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        with in_mode(module, training=False):
            y = module(x)
            g, u = _gate_and_up(module, roles, gate_first, x)
            expected = module.get_submodule(roles[2])(f(g) * u)
    except Exception:  # any failure of a stranger's forward means: not a gated MLP
        return False
    return isinstance(y, Tensor) and torch.equal(y, expected)
