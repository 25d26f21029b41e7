"""GELU and SiLU modules, whatever they are called."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.layers.base import Compressed, Match, trained
from prac.ops import ACTIVATIONS, Activation, activated, activation
from prac.source import mark
from prac.stored import Stored
from prac.tangible import tangible


class ElementWise(Compressed):
    """Keeps Z = X P, or X in few bits, in place of X (and of whatever the original's formula keeps).

    From few bits the output can be had again, so that a linear layer which reads it keeps nothing. From a
    projection it could not: that would be a bias in the weight's gradient.
    """

    kind: ClassVar[Kind] = "activation"
    _prac_function: Activation

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., m) to (..., m)."""
        if not trained(x):
            return self._original(x)
        estimator = self.estimators["x"]
        h = activation(x, self._prac_function, estimator, compute=self._original)
        return mark(h, activated(estimator.keep(x), self._prac_function)) if isinstance(estimator, Stored) else h


@torch.no_grad()
def function_of(module: nn.Module) -> Activation | None:
    """Which known activation a module computes, found by evaluating it on a grid."""
    if any(True for _ in module.parameters()) or any(module.children()):
        return None
    with tangible(module):
        x = torch.linspace(-6, 6, 97, device="cpu")
        try:
            y = module(x)
        except Exception:  # any failure of a stranger's forward means: none of ours
            return None
        for function in ACTIVATIONS.values():
            if isinstance(y, Tensor) and torch.allclose(y, function.forward(x), rtol=1e-5, atol=1e-6):
                return function
        return None


def recognise(module: nn.Module) -> Match | str | None:
    """A GELU or SiLU by its name, then by its values."""
    name = type(module).__name__.lower()
    if not any(word in name for word in ("gelu", "silu", "swish")) or any(module.children()):
        return None
    function = function_of(module)
    if function is None:
        return "an activation, but its values are not those of GELU (exact or tanh) or SiLU"
    # Its width is that of whatever comes along.
    return Match(ElementWise, {"x": None}, {"_prac_function": function})
