"""MLPs, ``down(f(gate(x)) * up(x))`` and ``down(f(up(x)))``, found by evaluating them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.estimator import Tensors
from prac.layers.activation import function_of
from prac.layers.base import Compressed, Match, is_hooked, trained
from prac.layers.linear import Linear
from prac.ops import ACTIVATIONS, Activation, Normed, glu, norm_mlp, product
from prac.source import mark, source_of
from prac.stored import Stored
from prac.structure import in_mode
from prac.tangible import tangible


class Roles(NamedTuple):
    """The names of an MLP's children by what they do; "" for none."""

    into: tuple[str, ...]  # gate and up; one layer for both, or up alone
    down: str
    function: Activation
    gated: bool
    gate_first: bool = True  # where one layer gives both, whether the gate is its first half
    original: str = ""  # the child that computes the function; "" where the module calls torch's
    dropout: str = ""  # a dropout after down


class MLP(Compressed):
    """Behind a norm that shares its x̂, one operation from there to the output; else the product alone.

    The one operation keeps g and u (or a) and computes f(g) u again. Otherwise the linear layers are
    compressed as such, and what changes hands is the product in between, without keeping f(g).
    """

    kind: ClassVar[Kind] = "activation"
    _prac_roles: Roles

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        source = source_of(x)
        if isinstance(source, Normed) and self._runs_as_one():
            return self._from_norm(x, source)
        if not self._prac_roles.gated:
            return self._original(x)
        return self._product(x)

    def _runs_as_one(self) -> bool:
        layers = self._layers()
        return isinstance(self.estimators["gate"], Stored) and len(layers) == len(self._prac_roles.into) + 1

    def _layers(self) -> list[Linear]:
        """Those of its linear layers that prac may run without calling them, in order."""
        layers = [self.get_submodule(name) for name in (*self._prac_roles.into, self._prac_roles.down)]
        return [layer for layer in layers if isinstance(layer, Linear) and not is_hooked(layer)]

    def _from_norm(self, x: Tensor, normed: Normed) -> Tensor:
        roles, keep = self._prac_roles, self.estimators["gate"]
        assert isinstance(keep, Stored)
        *into, down = (layer.parameters_ON() for layer in self._layers())
        shape = {"is_gated": roles.gated, "gate_first": roles.gate_first}
        seen = None if keep.observer is None else self._observer()
        y = norm_mlp(x, normed, into, down, roles.function.name, keep.bits, **shape, seen=seen)
        return self._drop(y)

    def _observer(self) -> Callable[[Tensor, Tensors], None]:
        """Passes what the one operation keeps of g, and then of u, on to whoever observes them."""
        estimators = iter(self.estimators.values())

        def seen(z_MK: Tensor, tensors: Tensors) -> None:
            estimator = next(estimators)
            if isinstance(estimator, Stored) and estimator.observer is not None:
                estimator.observer(z_MK, estimator.kept(tensors, z_MK.shape[1], z_MK.dtype))

        return seen

    def _drop(self, y: Tensor) -> Tensor:
        if self._prac_roles.dropout:
            y = self.get_submodule(self._prac_roles.dropout)(y)
        return y

    def _product(self, x: Tensor) -> Tensor:
        roles = self._prac_roles
        g, u = _gate_and_up(self, roles, x)
        f = self.get_submodule(roles.original) if roles.original else roles.function.forward
        gate, up = self.estimators["gate"], self.estimators["up"]
        if trained(g, u):  # only now known, and asking computes them
            h = glu(g, u, roles.function, gate, up, compute=f)
            if isinstance(gate, Stored) and isinstance(up, Stored):
                h = mark(h, product(gate.keep(g), up.keep(u), roles.function))
        else:
            h = f(g) * u
        y: Tensor = self.get_submodule(roles.down)(h)
        return self._drop(y)


def _gate_and_up(module: nn.Module, roles: Roles, x: Tensor) -> tuple[Tensor, Tensor]:
    if len(roles.into) == 1:
        first, second = module.get_submodule(roles.into[0])(x).chunk(2, dim=-1)
        return (first, second) if roles.gate_first else (second, first)
    g, u = (module.get_submodule(name)(x) for name in roles.into)
    return g, u


def recognise(module: nn.Module) -> Match | str | None:
    """A module whose children could make up an MLP, if it computes what one would.

    Two or three linear layers (or wrappers of them, such as PEFT's), at most one activation, and no
    active dropout but one at the end. Each way to assign the roles is tried on random input against the
    module itself, so neither names nor classes matter.
    """
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if hasattr(child, "in_features") or hasattr(child, "nf")}
    others = [name for name, child in children.items() if name not in linears and not _is_idle(child)]
    dropouts = [name for name in others if isinstance(children[name], nn.Dropout)]
    others = [name for name in others if name not in dropouts]
    if len(linears) not in (2, 3) or len(others) > 1 or len(dropouts) > 1:
        return None
    original, dropout = others[0] if others else "", dropouts[0] if dropouts else ""
    functions = [function_of(children[original])] if original else list(ACTIVATIONS.values())
    candidates = [
        (roles._replace(function=f, original=original, dropout=dropout), width)
        for roles, width in _assignments(linears)
        for f in functions
        if f is not None
    ]
    if not candidates:
        return None
    with tangible(module) as tried:
        found = [(roles, width) for roles, width in candidates if _computes(tried, roles)]
        if not found or (dropout and not _ends_in(tried, dropout, found[0][0].down)):
            return None
    if len(found) > 1:  # with weights of zero, gate and up cannot be told apart
        return "a gated MLP, but its weights do not tell the gate from the other factor; compress after initialising it"
    roles, width = found[0]
    inputs: dict[str, int | None] = {"gate": width, "up": width} if roles.gated else {"gate": width}
    return Match(MLP, inputs, {"_prac_roles": roles}, grouped=MLP)


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _assignments(linears: dict[str, nn.Module]) -> Iterator[tuple[Roles, int]]:
    """Every way to assign the roles that the shapes allow, with the width of the hidden layer."""
    anything = ACTIVATIONS["silu"]
    shape = {name: _shape(linear) for name, linear in linears.items()}
    if len(shape) == 3:
        for gate, up, down in itertools.permutations(shape):
            (n, m) = shape[gate]
            if shape[up] == (n, m) and shape[down][0] == m:
                yield Roles((gate, up), down, anything, True), m
        return
    for into, down in itertools.permutations(shape):
        m = shape[down][0]
        if shape[into][1] == 2 * m:
            yield Roles((into,), down, anything, True, gate_first=True), m
            yield Roles((into,), down, anything, True, gate_first=False), m
        if shape[into][1] == m:
            yield Roles((into,), down, anything, False), m


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Features in and out."""
    if hasattr(linear, "nf"):
        n, o = linear.weight.shape  # type: ignore[misc]
        return n, o
    return linear.in_features, linear.out_features  # type: ignore[return-value]


@torch.no_grad()
def _computes(module: nn.Module, roles: Roles) -> bool:
    """Whether the module is this MLP, to the bit, on two random tokens."""
    parameter = next(module.get_submodule(roles.into[0]).parameters())
    n, _ = _shape(module.get_submodule(roles.into[0]))
    x = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(0)).to(parameter)
    f: Callable[[Tensor], Tensor] = module.get_submodule(roles.original) if roles.original else roles.function.forward
    try:
        with in_mode(module, training=False):
            y = module(x)
            if roles.gated:
                g, u = _gate_and_up(module, roles, x)
                h = f(g) * u
            else:
                h = f(module.get_submodule(roles.into[0])(x))
            expected = module.get_submodule(roles.down)(h)
    except Exception:  # any failure of a stranger's forward means: not an MLP
        return False
    return isinstance(y, Tensor) and torch.equal(y, expected)


@torch.no_grad()
def _ends_in(module: nn.Module, dropout: str, down: str) -> bool:
    """Whether the dropout is called last, after ``down``."""
    calls: list[str] = []
    hooks = [
        child.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        for name, child in module.named_children()
    ]
    parameter = next(module.get_submodule(down).parameters())
    n = next(
        _shape(child)[0]
        for name, child in module.named_children()
        if name != down and name != dropout and any(True for _ in child.parameters())
    )
    try:
        with in_mode(module, training=False):
            module(torch.zeros(1, 1, n).to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    return calls[-2:] == [down, dropout]
