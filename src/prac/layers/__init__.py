"""Layers that keep compressed activations, one file per kind."""

from collections.abc import Hashable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prac.layers import activation, find_mlp, linear, norm
from prac.layers.activation import ElementWise
from prac.layers.alike import signature
from prac.layers.attention import Attention
from prac.layers.base import Compressed, overrides_forward
from prac.layers.mlp import MLP
from prac.layers.norm import SharedNorm
from prac.layers.record import MAKER, Match, Source
from prac.layers.swapping import swap, unswap

__all__ = [
    "MAKER",
    "MLP",
    "Attention",
    "Compressed",
    "ElementWise",
    "Match",
    "SharedNorm",
    "Source",
    "layers_of",
    "overrides_forward",
    "recognise",
    "swap",
    "unswap",
]


def layers_of(model: nn.Module) -> dict[str, Compressed]:
    """The compressed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Compressed)}


def recognise(
    module: nn.Module, device: torch.device | None = None, known: dict[Hashable, Match | None] | None = None
) -> Match | str | None:
    """How to compress a module: a :class:`Match`, why not (a str), or None for no such kind.

    Args:
        module: it stays as it is.
        device: where modules without parameters are tried; it is that of the model.
        known: what was found of other modules of the model, by :func:`prac.layers.alike.signature`, filled here: of
            the like blocks of a deep model one is tried.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if any(is_lazy(p) for p in module.parameters()):
        own = any(is_lazy(p) for p in module.parameters(recurse=False))
        return "its weights are not made yet; compress after the first batch" if own else None
    key = None if known is None else signature(module)
    if known is not None and key in known:
        return known[key]
    found = _recognise(module, device)
    if known is not None and key is not None and not isinstance(found, str):  # a reason may be of its weights
        known[key] = found
    return found


def _recognise(module: nn.Module, device: torch.device | None) -> Match | str | None:
    found: Match | str | None = None
    for kind in (linear, norm):
        found = found or kind.recognise(module)
    for kind in (activation, find_mlp):
        found = found or kind.recognise(module, device)
    if isinstance(found, Match) and overrides_forward(module):
        return "its forward was replaced on the instance (by hooks of accelerate, or a kernel); compress first"
    return found
