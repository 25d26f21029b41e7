"""Whole numbers among tensors without numbers.

What models decide by numbers they nearly always decide by whole ones: which tokens stand for images, where a sequence
ends, how long each is. Those are few, and cost nothing to compute for real beside activations that are not computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST = 2**24  # of a tensor, so that a mask of all pairs of many tokens is not computed


def is_whole(tensor: Tensor) -> bool:
    """Whether it holds whole numbers or truth values, and not too many of them."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= MOST


class WholeNumbers(TorchDispatchMode):
    """Inside a fake mode: operations on whole numbers alone are done for real; all others stay without numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_done_for_real(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*_by_places(func, args), **kwargs)

    def _is_done_for_real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            return False
        dtype = kwargs.get("dtype")
        if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
            return False
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:  # made from nothing
            counts = func.overloadpacket is torch.ops.aten.arange and not any(isinstance(x, float) for x in leaves)
            return (counts or dtype is not None) and math.prod(x for x in leaves if type(x) is int and x > 0) <= MOST
        if not all(is_whole(t) and not isinstance(t, FakeTensor) and t.device.type == "cpu" for t in tensors):
            return False
        try:
            return torch.broadcast_shapes(*(t.shape for t in tensors)).numel() <= MOST
        except RuntimeError:  # not to be broadcast
            return True


def _by_places(func: Any, args: Any) -> Any:
    """Indices given as truth values, as the places of the true ones: of those the number is known."""
    indexing = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
    if getattr(func, "overloadpacket", None) not in indexing:
        return args
    places: list[Tensor | None] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        if is_mask:
            with unset_fake_temporarily():
                places += index.nonzero().unbind(1)
        else:
            places.append(index)
    return (args[0], places, *args[2:])
