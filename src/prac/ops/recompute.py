"""Outputs of element-wise layers, computed again from what is kept of their inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prac.estimators.base import Form, Kept
from prac.estimators.codes import Tensors
from prac.ops.elementwise import Activation


@dataclass(frozen=True)
class Activated(Form):
    """The form of ``f(x)`` where x is what is kept."""

    x: Form
    function: Activation

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """``f(x̃)``, (M, n)."""
        return self.function.forward(self.x.reconstruct(tensors))


@dataclass(frozen=True)
class Product(Form):
    """The form of ``f(g) u`` where g and u are what is kept, g in the first ``split`` tensors."""

    g: Form
    u: Form
    split: int
    function: Activation

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """``f(g̃) ũ``, (M, n)."""
        g_MN = self.g.reconstruct(tensors[: self.split])
        return self.function.forward(g_MN) * self.u.reconstruct(tensors[self.split :])


def recomputed(kept: Kept, function: Activation) -> Kept:
    """What is kept of ``function(x)``, where ``kept`` is of x."""
    return Kept(kept.tensors, Activated(kept.form, function))


def recomputed_product(g: Kept, u: Kept, function: Activation) -> Kept:
    """What is kept of ``function(g) u``."""
    return Kept((*g.tensors, *u.tensors), Product(g.form, u.form, len(g.tensors), function))
