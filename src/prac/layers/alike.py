"""Whether a stranger's module computes a formula, asked by running both; and whether two modules are alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prac.layers.record import way
from prac.quiet import quietly

MOST = 12  # modules inside of one that is worth comparing with others
_OWN = set(vars(nn.Module()))


def signature(module: nn.Module) -> Hashable | None:
    """Equal for modules of one model that do the same with other weights; None for those of many parts.

    It knows attributes that are not plain by their identity, and so is of use only while the modules stay as they are.
    """
    inside = list(islice(module.modules(), MOST + 1))
    numbers = {part: number for number, part in enumerate(inside)}
    return None if len(inside) > MOST else tuple(_looks(part, numbers) for part in inside)


def _looks(module: nn.Module, numbers: dict[nn.Module, int]) -> tuple[Any, ...]:
    forward, settings = way(module)
    plain = tuple((name, type(value), str(value), value) for name, value in settings.items())
    others = tuple((n, id(value)) for n, value in vars(module).items() if n not in settings and n not in _OWN)
    parameters = tuple((n, None if p is None else _shape(p)) for n, p in module._parameters.items())
    buffers = tuple((name, id(buffer)) for name, buffer in module._buffers.items())
    children = tuple((name, None if child is None else numbers[child]) for name, child in module._modules.items())
    return type(module), forward, plain, others, parameters, buffers, children


def _shape(p: nn.Parameter) -> tuple[Any, ...]:
    own = tuple((name, id(value)) for name, value in vars(p).items())
    return type(p), p.shape, p.dtype, p.device, p.requires_grad, own


def distances(
    module: nn.Module, formulas: Sequence[Callable[[Tensor], Tensor]], x: Tensor, *, held: Sequence[nn.Module] = ()
) -> list[float]:
    """The largest difference between what the module and each formula give for ``x``, values and gradients.

    In eval mode and in training, of each row in units of its largest value. Infinite where the module draws random
    numbers, changes itself, gives something of another shape or dtype, or fails.

    Args:
        module: a stranger's; it is run quietly (:func:`prac.quiet.quietly`).
        formulas: what it may compute; may call children of the module.
        x: (..., n), where the module lives, of many sizes: what cuts large values off shows there alone.
        held: children that stay in eval mode, since their training is known (a dropout).
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
                before = _state(module), _random_state(x)
                found.append(_value_and_gradient(module, x, dy))
                if not _same(before, (_state(module), _random_state(x))):
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


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Its plain attributes, and how much is in its lists and dicts."""
    sizes = {name: len(value) for name, value in vars(module).items() if isinstance(value, list | dict | set)}
    return way(module), sizes


def _random_state(x: Tensor) -> tuple[Any, ...]:
    device = (torch.cuda.get_rng_state(x.device),) if x.device.type == "cuda" else ()
    return (random.getstate(), torch.random.get_rng_state(), *device)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    return bool(before == after)
