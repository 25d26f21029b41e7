"""Output heads whose logits are put off while a call of the model that wants it is under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prac.convert.deferred import Deferred
from prac.layers import Compressed
from prac.runtime.under_way import UnderWay


class Call:
    """A call of a model that is under way: the head whose logits are put off, if any, and whether a loss took them."""

    def __init__(self, model: nn.Module) -> None:
        self.under_way = UnderWay(model)
        self.of: Callable[[], nn.Module | None] = _none  # weakly, should the end of the call never come
        self.taken = False


def _none() -> None:
    pass


class _Calls(threading.local):
    """Those of this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Call] = []

    def innermost(self) -> Call | None:
        """The last that is still under way."""
        while self.stack and self.stack[-1].under_way.is_over():
            self.stack.pop()
        return self.stack[-1] if self.stack else None


calls = _Calls()
Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Decorates what torch.compile is to run as written: calls under way live between functions, out of its sight."""
    hidden: Function = torch.compiler.disable(function, reason="prac takes the loss from the head outside of graphs")
    return hidden


class PuttingOff:
    """The ``forward`` of one output head, which puts its logits off where the call that is under way wants that.

    It refers to the head weakly, so that neither keeps the other alive; a copy of the head has its own.
    """

    def __init__(self, head: nn.Linear, always: bool) -> None:
        self.of, self._always = weakref.ref(head), always

    def __call__(self, hidden: Tensor) -> Any:
        """Logits (..., V) of (..., N), or what stands for them."""
        head = self.of()
        assert head is not None
        if self._always or head.training:
            return self._perhaps(head, hidden)
        return type(head).forward(head, hidden)

    @staticmethod
    @outside_graphs
    def _perhaps(head: nn.Linear, hidden: Tensor) -> Any:
        call = calls.innermost()
        wanted = call is not None and call.of() is head
        return Deferred(hidden, head) if wanted else type(head).forward(head, hidden)

    def __reduce__(self) -> tuple[Any, ...]:
        return PuttingOff, (self.of(), self._always)


def why_not(head: Any) -> str:
    """Why the logits of this head cannot be put off; ``""`` if they can."""
    if not isinstance(head, nn.Linear):
        return f"its output head is a {type(head).__name__}, not a linear layer"
    is_plain = isinstance(head, Compressed) or type(head).forward is nn.Linear.forward
    if not is_plain or not isinstance(vars(head).get("forward"), PuttingOff | None):
        return f"its output head, a {type(head).__name__}, has a forward of its own"
    if head._backward_hooks or head._backward_pre_hooks:
        return "somebody has hooked on to the gradients of its output head"
    if is_traceable_wrapper_subclass(head.weight) and not hasattr(type(head), "unshard"):
        return f"the weight of its output head is a {type(head.weight).__name__}"
    return ""
