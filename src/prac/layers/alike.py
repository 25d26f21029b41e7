"""Whether a stranger's module computes a formula, asked by running both; and whether two modules are alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from prac.layers.reach import attributes
from prac.layers.way import Way, way
from prac.runtime.quiet import quietly, version

MOST = 12  # modules inside of one that is worth comparing with others
_PLAIN = (bool, int, float, str, type(None), type)


def signature(module: nn.Module) -> Hashable | None:
    """Equal for modules of one model that do the same with other weights; None where that cannot be told.

    That is where it has many parts, or code that looks at its children's parameters, or at what is not its own (a
    table). A module's own parameters are others while it is tried, so that looking at those tells nothing of it.
    It knows attributes that are not plain by their identity, and so is of use only while the modules stay as they are.
    """
    inside = list(islice(module.modules(), MOST + 1))
    if len(inside) > MOST or any(isinstance(part, torch.jit.ScriptModule) for part in inside):
        return None
    found = way(module)
    parameters = {name.rpartition(".")[2] for name, _ in module.named_parameters()} - module._parameters.keys()
    parameters |= {"parameters", "named_parameters", "state_dict"}
    around = any(each.is_around and not isinstance(each.thing, FunctionType | type) for each in found.reached)
    if found.words is None or found.words & parameters or around:
        return None
    numbers = {part: number for number, part in enumerate(inside)}
    return tuple(_looks(part, numbers) for part in inside)


def _looks(module: nn.Module, numbers: dict[nn.Module, int]) -> tuple[Any, ...]:
    own = attributes(module).items()
    settings = tuple((n, type(v), str(v), v) if isinstance(v, _PLAIN) else (n, id(v)) for n, v in own)
    parameters = tuple((n, None if p is None else _shape(p)) for n, p in module._parameters.items())
    buffers = tuple((name, id(buffer)) for name, buffer in module._buffers.items())
    children = tuple((name, None if child is None else numbers[child]) for name, child in module._modules.items())
    return type(module), type(module).forward, settings, parameters, buffers, children


def _shape(p: nn.Parameter) -> tuple[Any, ...]:
    own = tuple((name, id(value)) for name, value in vars(p).items())
    return type(p), p.shape, p.dtype, p.device, p.requires_grad, own


def distances(
    module: nn.Module,
    formulas: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    held: Sequence[nn.Module] = (),
    called: Sequence[nn.Module] = (),
) -> list[float]:
    """The largest difference between what the module and each formula give for ``x``, values and gradients.

    In eval mode and in training, of each row in units of its largest value. Infinite where the module draws random
    numbers, changes itself, gives something of another shape or dtype, or fails.

    Args:
        module: a stranger's; it is run quietly (:func:`prac.runtime.quiet.quietly`).
        formulas: what it may compute; may call children of the module.
        x: (..., n), where the module lives, of many sizes: what cuts large values off shows there alone.
        held: children that stay in eval mode, since their training is known (a dropout).
        called: children that the formulas call too, so that they may change themselves.
    """
    dy = torch.randn(x.shape[:-1], generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    nothing = [float("inf")] * len(formulas)
    try:
        with quietly(module), torch.enable_grad():
            found = []
            for training in (False, True):
                module.train(training)
                for child in held:
                    child.eval()
                state, random_state = _state(module, called), _random_state(x)
                found.append(_value_and_gradient(module, x, dy))
                if not _is_still(state) or not _same(random_state, _random_state(x)):
                    return nothing
            module.eval()
            return [_from_all(found, formula, x, dy) for formula in formulas]
    except Exception:  # any failure of a stranger's forward means: none of these
        return nothing


def _from_all(found: list[tuple[Tensor, Tensor]], formula: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    try:
        expected = _value_and_gradient(formula, x, dy)
    except Exception:  # it calls the stranger's children
        return float("inf")
    if not expected[1].any():  # weights of zero, behind which any formula looks like any other
        return float("inf")
    return max(_apart(a, b) for pair in found for a, b in zip(pair, expected, strict=True))


def _value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and the gradient of Σ dy_i Σ_j y_ij with alternating signs, so that no sum hides it."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    signs = torch.where(torch.arange(y.shape[-1], device=y.device) % 3 == 1, -1.0, 1.0).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype).unsqueeze(-1) * signs)
    return y.detach(), dx


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    a, b = (t.float().reshape(-1, t.shape[-1]) for t in (a, b))
    largest = b.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    apart = ((a - b).abs().amax(-1) / largest).max().item()
    return apart if apart == apart else float("inf")


def _state(module: nn.Module, called: Sequence[nn.Module]) -> list[tuple[nn.Module, Way, list[Any]]]:
    """How each of its parts computes but those that are called, and their buffers as they are."""
    others = {part for child in called for part in child.modules()}
    return [(part, way(part), _buffers(part)) for part in module.modules() if part not in others]


def _buffers(module: nn.Module) -> list[tuple[Tensor, Any]]:
    return [(b, version(b)) for b in module._buffers.values() if b is not None]


def _is_still(state: list[tuple[nn.Module, Way, list[Any]]]) -> bool:
    for part, then, buffers in state:
        now = _buffers(part)
        if any(then.differences(part, type(part))) or len(now) != len(buffers):
            return False
        if any(a is not b or m != n for (a, m), (b, n) in zip(now, buffers, strict=True)):
            return False
    return True


def _random_state(x: Tensor) -> tuple[Any, ...]:
    device = (torch.cuda.get_rng_state(x.device),) if x.device.type == "cuda" else ()
    return (random.getstate(), torch.random.get_rng_state(), *device)


def _same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
