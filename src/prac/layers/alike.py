"""Whether a stranger's module computes a formula: asked by running both."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prac.layers.record import way
from prac.quiet import quietly

GENERATOR_SEED = 0


def distance(
    module: nn.Module, formula: Callable[[Tensor], Tensor], x: Tensor, *, held: Sequence[nn.Module] = ()
) -> float:
    """The largest difference between what the module and the formula give for ``x``, values and gradients.

    In eval mode and in training, of each row in units of its largest value. Infinite where the module draws random
    numbers, changes itself, gives something of another shape or dtype, or fails.

    Args:
        module: a stranger's; it is run quietly (:func:`prac.quiet.quietly`).
        formula: what it may compute; may call children of the module.
        x: (..., n), where the module lives, of many sizes: what cuts large values off shows there alone.
        held: children that stay in eval mode, since their training is known (a dropout).
    """
    dy = torch.randn(x.shape[:-1], generator=torch.Generator().manual_seed(GENERATOR_SEED), device="cpu").to(x)
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
                    return float("inf")
            module.eval()
            expected = _value_and_gradient(formula, x, dy)
            return max(_apart(a, b) for pair in found for a, b in zip(pair, expected, strict=True))
    except Exception:  # any failure of a stranger's forward means: not this formula
        return float("inf")


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
