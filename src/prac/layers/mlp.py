"""MLPs, ``down(f(gate(x)) * up(x))`` and ``down(f(up(x)))``, found by evaluating them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.estimator import Tensors
from prac.layers.activation import function_of
from prac.layers.alike import distances
from prac.layers.base import Compressed, has_hooks, is_hooked, trained
from prac.layers.linear import Linear
from prac.layers.record import Match, Way, way
from prac.ops import ACTIVATIONS, Activation, Normed, glu, norm_mlp, product
from prac.quiet import quietly
from prac.source import mark, source_of
from prac.stored import Stored
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

    def differs(self) -> str:
        """As for any layer; its activation, dropouts and what else does nothing are its own business too."""
        for name, then in self._prac.match.facts.ways.items():
            child = self._modules.get(name)
            if child is None or "forward" in vars(child) or then.differs(child, type(child)):
                return f"its {name} was changed"
        original = self._prac.match.facts.roles.original
        if original and has_hooks(self.get_submodule(original)):  # what they do has no derivative here
            return f"its {original} has hooks"
        return super().differs()

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        roles, source = self._prac.match.facts.roles, source_of(x)
        if isinstance(source, Normed) and self._runs_as_one():
            return self._from_norm(x, source)
        return self._product(x) if roles.gated else self._original(x)

    def _runs_as_one(self) -> bool:
        """Whether nobody would miss the calls of its children."""
        roles = self._prac.match.facts.roles
        linears = [self.get_submodule(name) for name in (*roles.into, roles.down)]
        ours = all(isinstance(layer, Linear) and not layer.differs() for layer in linears)
        alone = not any(
            is_hooked(child) or "forward" in vars(child) or type(child).__call__ is not nn.Module.__call__
            for child in self.children()
        )
        return isinstance(self.estimators["gate"], Stored) and ours and alone

    def _parameters_ON(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer = self.get_submodule(name)
        assert isinstance(layer, Linear)
        return layer.parameters_ON()

    def _from_norm(self, x: Tensor, normed: Normed) -> Tensor:
        roles, keep = self._prac.match.facts.roles, self.estimators["gate"]
        assert isinstance(keep, Stored)
        into, down = [self._parameters_ON(name) for name in roles.into], self._parameters_ON(roles.down)
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
        dropout = self._prac.match.facts.roles.dropout
        return self.get_submodule(dropout)(y) if dropout else y

    def _product(self, x: Tensor) -> Tensor:
        roles = self._prac.match.facts.roles
        g, u = _gate_and_up(self, roles, x)
        gate, up = self.estimators["gate"], self.estimators["up"]
        f = _function(self, roles)
        if trained(g, u):  # only now known, and asking computes them
            h = glu(g, u, roles.function, gate, up, compute=f)
            if isinstance(gate, Stored) and isinstance(up, Stored):
                h = mark(h, product(gate.keep(g), up.keep(u), roles.function))
        else:
            h = f(g) * u
        y: Tensor = self.get_submodule(roles.down)(h)
        return self._drop(y)


def _function(module: nn.Module, roles: Roles) -> Callable[[Tensor], Tensor]:
    """Its activation: the child, unless that would overwrite what is to be kept."""
    original = module.get_submodule(roles.original) if roles.original else None
    return roles.function.forward if original is None or getattr(original, "inplace", False) else original


def _gate_and_up(module: nn.Module, roles: Roles, x: Tensor) -> tuple[Tensor, Tensor]:
    if len(roles.into) == 1:
        first, second = module.get_submodule(roles.into[0])(x).chunk(2, dim=-1)
        return (first, second) if roles.gate_first else (second, first)
    g, u = (module.get_submodule(name)(x) for name in roles.into)
    return g, u


def recognise(module: nn.Module, device: torch.device | None = None) -> Match | str | None:
    """A module whose children could make up an MLP, if it computes what one would.

    Two or three linear layers (or wrappers of them, such as PEFT's), at most one activation, and no
    active dropout but one at the end. Each way to assign the roles is tried on random input against the
    module itself, so neither names nor classes matter.
    """
    if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        return None  # it does something with them
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if hasattr(child, "in_features") or hasattr(child, "nf")}
    others = [name for name, child in children.items() if name not in linears and not _is_idle(child)]
    dropouts = [name for name in others if isinstance(children[name], nn.Dropout)]
    others = [name for name in others if name not in dropouts]
    if len(linears) not in (2, 3) or len(others) > 1 or len(dropouts) > 1:
        return None
    original, dropout = others[0] if others else "", dropouts[0] if dropouts else ""
    functions = [function_of(children[original], device)] if original else list(ACTIVATIONS.values())
    candidates = [
        (roles._replace(function=f, original=original, dropout=dropout), width)
        for roles, width in _assignments(linears)
        for f in functions
        if f is not None
    ]
    if not candidates:
        return None
    with tangible(module) as real:
        # In float32, since the rounding of fewer bits is as large as what sets one formula apart from another.
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in real.parameters())
        tried = copy.deepcopy(real).float() if half else real
        found = _computed_by(tried, candidates)
        if not found and any(_is_zero(tried.get_submodule(name)) for name in linears):
            return "weights of zero do not show what it computes: its layers are compressed one by one, f stays in full"
        if not found or (dropout and not _ends_in(tried, dropout, found[0][0].down)):
            return None
    if len(found) > 1:  # with weights of zero, gate and up cannot be told apart
        return "a gated MLP, but its weights do not tell the gate from the other factor; compress after initialising it"
    roles, width = found[0]
    inputs: dict[str, int | None] = {"gate": width, "up": width} if roles.gated else {"gate": width}
    ways = {name: _way(child, name == dropout) for name, child in children.items() if name not in linears}
    return Match(MLP, inputs, Facts(roles, ways), grouped=MLP)


def _is_zero(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return isinstance(weight, Tensor) and not weight.any()


def _way(child: nn.Module, is_called: bool) -> Way:
    """A child's way of computing; the probability of a dropout that is called is read at the call."""
    found = way(child)
    return Way(found.forward, {}) if is_called else found


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
def _computed_by(module: nn.Module, candidates: list[tuple[Roles, int]]) -> list[tuple[Roles, int]]:
    """Those of the candidates that the module computes, in both modes; of those that differ in f alone, the nearest."""
    errors: dict[tuple[Roles, int], float] = {}
    for _, group in itertools.groupby(candidates, key=lambda candidate: candidate[0].into[0]):
        like = list(group)
        roles = like[0][0]
        try:
            x = _tokens(module, roles)
        except Exception:  # any failure of a stranger's forward means: not an MLP that begins so
            continue
        held = [module.get_submodule(roles.dropout)] if roles.dropout else []
        found = distances(module, [functools.partial(_expected, module, roles) for roles, _ in like], x, held=held)
        most = 32 * torch.finfo(x.dtype).eps
        errors |= {each: error for each, error in zip(like, found, strict=True) if error <= most}
    nearest: dict[Roles, tuple[Roles, int]] = {}
    for roles, width in sorted(errors, key=lambda found: errors[found]):
        nearest.setdefault(roles._replace(function=candidates[0][0].function), (roles, width))
    return list(nearest.values())


def _tokens(module: nn.Module, roles: Roles) -> Tensor:
    """Random tokens of three sizes, the first of which brings the outputs of the first layer to where f bends.

    So factors can be told apart, and limits that are put on large values show.
    """
    first = module.get_submodule(roles.into[0])
    parameter = next(first.parameters())
    f32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are
    x = torch.randn(1, 6, _shape(first)[0], generator=torch.Generator().manual_seed(0), **f32).to(parameter)
    with quietly(module):
        size = module.eval().get_submodule(roles.into[0])(x).float().square().mean().sqrt().item()
    sizes = torch.tensor([1.0, 1.0, 5.0, 5.0, 40.0, 40.0], **f32).to(parameter).unsqueeze(1)
    return x * sizes / max(size, 1e-3)


def _expected(module: nn.Module, roles: Roles, x: Tensor) -> Tensor:
    """What an MLP of these roles computes."""
    f = _function(module, roles)
    if roles.gated:
        g, u = _gate_and_up(module, roles, x)
        h = f(g) * u
    else:
        h = f(module.get_submodule(roles.into[0])(x))
    y: Tensor = module.get_submodule(roles.down)(h)
    return y


@torch.no_grad()
def _ends_in(module: nn.Module, dropout: str, down: str) -> bool:
    """Whether the dropout is called last, after ``down``."""
    calls: list[str] = []
    parameter = next(module.get_submodule(down).parameters())
    n = next(
        _shape(child)[0]
        for name, child in module.named_children()
        if name != down and name != dropout and any(True for _ in child.parameters())
    )
    with quietly(module):
        for name, child in module.named_children():
            child.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        module.eval()
        module(torch.zeros(1, 1, n, dtype=torch.float32, device="cpu").to(parameter))
    return calls[-2:] == [down, dropout]
