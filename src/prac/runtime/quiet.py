"""How to run a stranger's module without leaving a trace on it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
GLOBAL_HOOKS = [
    name for name in vars(torch_module) if name.startswith("_global_") and name.endswith(("_hooks", "_always_called"))
]


MOST = 20_000  # objects that are looked at; what a module refers to may be a whole program
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, MethodType)


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Inside the block nobody's hooks are called; whatever running ``model`` changes is put back afterwards.

    That is: hooks on modules, on the process and on saved tensors; attributes of its modules and of the objects that
    they refer to (configs), what is in their lists and dicts, buffers and other tensors but the parameters; random
    states. Inside ``torch.inference_mode`` it runs without.
    """
    with ExitStack() as stack, _no_inference_mode():
        for thing in _reachable(model):
            stack.callback(*_way_back(thing))
        for name in GLOBAL_HOOKS:
            hooks = getattr(torch_module, name)
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        for module in model.modules():
            vars(module).update((name, OrderedDict()) for name in HOOKS if name in vars(module))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numbers = sys.modules["numpy"].random
            stack.callback(numbers.set_state, numbers.get_state())
        cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(without_node, lambda tensor: tensor))
        yield


def without_node(tensor: Tensor) -> Tensor:
    """A saved tensor as it is, but for its graph: an output that its own node saves would keep itself alive."""
    return tensor if tensor.grad_fn is None else tensor.detach()


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Leave inference mode, which would turn gradients on, and leave those as they are."""
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


def _reachable(model: nn.Module) -> Iterator[Any]:
    """The modules, and what they refer to that can be changed in place, each once."""
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo and len(seen) < MOST:
        thing = todo.pop()
        if isinstance(thing, (*_SIMPLE, ModuleType, nn.Parameter)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset | deque):
            todo += thing
        elif not isinstance(thing, Tensor) and hasattr(thing, "__dict__"):
            todo += vars(thing).values()


def _way_back(thing: Any) -> tuple[Any, ...]:
    """A function, and its arguments, that makes a thing what it is now."""
    if isinstance(thing, Tensor):
        has_numbers = not thing.is_meta and thing.is_leaf
        return (_copy_back, thing, thing.detach().clone(), version(thing)) if has_numbers else (_nothing,)
    if isinstance(thing, torch.Generator):
        return thing.set_state, thing.get_state()
    if isinstance(thing, dict | list | set | deque):
        return _fill, thing, thing.copy()
    if type(thing).__name__ == "ndarray":
        return thing.__setitem__, ..., thing.copy()
    return (_fill, vars(thing), dict(vars(thing))) if hasattr(thing, "__dict__") else (_nothing,)


def _nothing() -> None:
    pass


def _fill(container: Any, before: Any) -> None:
    """Put back what was in it."""
    container.clear()
    container.extend(before) if isinstance(container, list | deque) else container.update(before)


def version(tensor: Tensor) -> int | None:
    """The number of its changes in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _copy_back(tensor: Tensor, before: Tensor, then: int | None) -> None:
    """If it changed: copying is a change too, and a graph that is being made may need it as it was."""
    if then is None or then != version(tensor):
        with torch.no_grad():
            tensor.copy_(before)
