"""How to run a stranger's module without leaving a trace on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
GLOBAL_HOOKS = [
    name for name in vars(torch_module) if name.startswith("_global_") and name.endswith(("_hooks", "_always_called"))
]


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Inside the block nobody's hooks are called; whatever running ``model`` changes is put back afterwards.

    That is: attributes of its modules, what their lists and dicts hold, their buffers, what they read from configs,
    the random state, the process's own hooks. Inside ``torch.inference_mode`` it runs without.
    """
    places = [*model.modules(), *_configs(model)]
    with ExitStack() as stack, _no_inference_mode():
        for place in places:
            stack.callback(_put_back, place, dict(vars(place)), _containers(place))
        for name in GLOBAL_HOOKS:
            hooks = getattr(torch_module, name)
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        for module in model.modules():
            vars(module).update((name, OrderedDict()) for name in HOOKS if name in vars(module))
        for buffer in model.buffers():
            if not buffer.is_meta:
                stack.callback(_copy_back, buffer, buffer.detach().clone())
        cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))
        yield


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Leave inference mode, which would turn gradients on, and leave those as they are."""
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The plain objects that modules refer to, such as their config, and those inside of them."""
    found: dict[int, Any] = {}
    todo = [value for module in model.modules() for value in vars(module).values()]
    while todo:
        value = todo.pop()
        if id(value) in found or not type(value).__name__.endswith("Config") or not hasattr(value, "__dict__"):
            continue
        found[id(value)] = value
        todo += vars(value).values()
    return list(found.values())


def _containers(place: Any) -> list[tuple[Any, Any]]:
    """What its attributes hold that can be changed in place, with a copy of each."""
    return [(value, value.copy()) for value in vars(place).values() if isinstance(value, dict | list | set)]


def _put_back(place: Any, attributes: dict[str, Any], containers: list[tuple[Any, Any]]) -> None:
    vars(place).clear()
    vars(place).update(attributes)
    for container, before in containers:
        if isinstance(container, list):
            container[:] = before
        else:
            container.clear()
            container.update(before)


def _copy_back(buffer: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(before)
