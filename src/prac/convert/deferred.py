"""Logits that are not there yet: what an output head returns to a loss that can do without them.

A loss that knows :class:`Deferred` takes the two factors. Whoever else touches it (a soft cap, a scale, a hook,
another loss) gets the logits, made at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Deferred:
    """``head(hidden)``, for ``hidden`` (..., N) and a head (V, N).

    Attributes:
        hidden: what the head was given.
        head: the head.
        touched: whether the logits were asked for, and may have been changed.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear) -> None:
        self.hidden, self.head, self.touched = hidden, head, False
        self._logits: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the logits, (..., V)."""
        return torch.Size([*self.hidden.shape[:-1], self.head.out_features])

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.hidden.device

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``hidden``, weight (V, N) and bias (V,)."""
        self._gather()
        return self.hidden, self.head.weight, self.head.bias

    def logits(self) -> Tensor:
        """The tensor, (..., V)."""
        self.touched = True
        if self._logits is None:
            self._gather()
            self._logits = type(self.head).forward(self.head, self.hidden)
        return self._logits

    def _gather(self) -> None:
        """Have the weight of a head that is a unit of FSDP2, which frees it as soon as the head's forward has returned.

        What would gather it again for backward is a hook on the tensor that a head returns. So it stays until the unit
        has its gradients, which are the first of backward.
        """
        if isinstance(unshard := getattr(type(self.head), "unshard", None), FunctionType):
            unshard(self.head)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and its libraries ask of any object
            raise AttributeError(name)
        return getattr(self.logits(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map_only(cls, cls.logits, args), **tree_map_only(cls, cls.logits, kwargs or {}))


def _forwarded(name: str) -> Callable[..., Any]:
    def operate(self: Deferred, *args: Any) -> Any:
        return getattr(self.logits(), name)(*args)

    return operate


_OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul neg abs iadd isub imul itruediv
    eq ne lt le gt ge and or invert getitem setitem len iter bool float
"""
for _name in _OPERATORS.split():
    setattr(Deferred, f"__{_name}__", _forwarded(f"__{_name}__"))


def settled(output: Any, taken: bool) -> Any:
    """The output without what stands for logits: they are left out where a loss has taken them, or made."""

    def settle(part: Any) -> Any:
        return part if not isinstance(part, Deferred) else None if taken else part.logits()

    if isinstance(output, tuple):
        return tuple(map(settle, output))
    if isinstance(output, Mapping) and any(isinstance(part, Deferred) for part in output.values()):
        parts = {name: settle(part) for name, part in output.items()}
        return type(output)(**{name: part for name, part in parts.items() if part is not None})
    return settle(output)
