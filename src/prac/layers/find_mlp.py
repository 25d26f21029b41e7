"""Which modules are MLPs, by evaluating them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prac.layers.activation import function_of
from prac.layers.alike import distances
from prac.layers.mlp import MLP, Facts, Roles, function_in, gate_and_up
from prac.layers.reach import is_of_library
from prac.layers.record import Match
from prac.layers.way import way
from prac.ops import ACTIVATIONS
from prac.runtime.fake import with_numbers
from prac.runtime.quiet import quietly


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
    if _looks_at_weights(module):
        return "its forward looks at weights itself: its layers are compressed one by one"
    with with_numbers(module) as real:
        # In float32, since the rounding of fewer bits is as large as what sets one formula apart from another.
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in real.parameters())
        left = [t for part in real.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
        tried = copy.deepcopy(real, {id(t): t.detach() for t in left}).float() if half else real
        found = [each for each in _computed_by(tried, candidates) if _agrees_under_autocast(real, each[0])]
        if not found and _has_zeros(tried, linears):
            return "weights of zero do not show what it computes: its layers are compressed one by one, f stays in full"
        if not found or (dropout and not _ends_in(tried, dropout, found[0][0].down)):
            return None
    if len(found) > 1:  # with weights of zero, gate and up cannot be told apart
        return "a gated MLP, but its weights do not tell the gate from the other factor; compress after initialising it"
    roles, width = found[0]
    inputs: dict[str, int | None] = {"gate": width, "up": width} if roles.gated else {"gate": width}
    ways = {name: way(child) for name, child in children.items() if name not in linears}
    return Match(MLP, inputs, Facts(roles, ways), grouped=MLP)


def _looks_at_weights(module: nn.Module) -> bool:
    """Whether its code does, and so may compute something else when they change; transformers' ask for dtypes alone."""
    words, inside = way(module).words, {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    return bool(words and words & inside) and not is_of_library(type(module), "transformers")


def _has_zeros(module: nn.Module, linears: Iterable[str]) -> bool:
    """Whether the weight of one of its linear layers is zero."""
    with quietly(module):  # a parametrised weight is computed when it is looked at
        weights = [getattr(module.get_submodule(name), "weight", None) for name in linears]
        return any(isinstance(weight, Tensor) and not weight.any() for weight in weights)


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
        called = [module.get_submodule(name) for name in (*roles.into, roles.down)]
        formulas = [functools.partial(_expected, module, roles) for roles, _ in like]
        found = distances(module, formulas, x, held=held, called=called)
        most = 32 * torch.finfo(x.dtype).eps
        errors |= {each: error for each, error in zip(like, found, strict=True) if error <= most}
    nearest: dict[Roles, tuple[Roles, int]] = {}
    for roles, width in sorted(errors, key=lambda found: errors[found]):
        nearest.setdefault(roles._replace(function=candidates[0][0].function), (roles, width))
    return list(nearest.values())


@torch.no_grad()
def _agrees_under_autocast(module: nn.Module, roles: Roles) -> bool:
    """Whether it computes what an MLP of these roles does also there, to a few bits: some forwards leave autocast."""
    device = next(module.parameters()).device.type
    if not torch.amp.is_autocast_available(device):
        return True
    x = _tokens(module, roles)[:, :1]
    try:
        with quietly(module), torch.autocast(device):
            y, expected = module.eval()(x), _expected(module, roles, x)
    except Exception:  # any failure of a stranger's forward means: not an MLP
        return False
    return y.dtype == expected.dtype and bool((y - expected).abs().max() <= 0.05 * expected.abs().max())


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
    f = function_in(module, roles)
    if roles.gated:
        g, u = gate_and_up(module, roles, x)
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
