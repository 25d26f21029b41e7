"""Layers that keep compressed activations, one file per kind."""

from torch import nn

from prac.layers import activation, linear, mlp, norm
from prac.layers.activation import ElementWise
from prac.layers.attention import Attention
from prac.layers.base import Compressed, Match, overrides_forward, swap, unswap
from prac.layers.mlp import MLP
from prac.layers.norm import SharedNorm

__all__ = [
    "MLP",
    "Attention",
    "Compressed",
    "ElementWise",
    "Match",
    "SharedNorm",
    "overrides_forward",
    "recognise",
    "swap",
    "unswap",
]


def recognise(module: nn.Module) -> Match | str | None:
    """How to compress a module: a :class:`Match`, why not (a str), or None for no such kind."""
    for kind in (linear, norm, activation, mlp):
        found = kind.recognise(module)
        if isinstance(found, Match) and overrides_forward(module):
            return "its forward was replaced on the instance (by hooks of accelerate, or a kernel); compress first"
        if found is not None:
            return found
    return None
