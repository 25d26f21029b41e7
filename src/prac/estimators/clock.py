"""The step t of Algorithm 1: optimizer steps, counted without the user's help."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()
_NONE = -1


class Clock:
    """Counts the optimizer steps taken on one model, or on what is left of it.

    Refreshes follow optimizer steps, not forward passes: gradient accumulation runs many
    forwards per step, and recomputation under checkpointing must see the same P. Every
    ``torch.optim`` optimizer reports its steps through one global hook.

    *Whose steps.* Those of optimizers that hold a parameter of the model, as its modules have them at that moment. Each
    module is known for itself, so a part of the model goes on counting when the whole is gone. An optimizer that
    holds parameters of no compressed model may still train one, through copies in float32 or flat shards: its
    steps count for models that run in training and that no other optimizer trains.

    *When.* The count moves at the first use after a step, so two optimizers that share a model (Muon for
    matrices, AdamW for the rest) make one step. An optimizer for each layer steps while backward still runs,
    between the recomputations of earlier layers; such a step counts from the next pass on.

    Loops that update weights by hand, without ``torch.optim``, call :meth:`tick`.

    Args:
        model: whose steps; None where it is not known.
        step: where to start.
    """

    def __init__(self, model: nn.Module | None, step: int = 0) -> None:
        self._modules = _references([] if model is None else model.modules())
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that hold its parameters
        self.on_step: Callable[[], None] = _nothing  # called after each
        self.tokens, self.has_waited = 0, False  # the most that a layer saw at once; whether one waited for more
        self._by_hand = self._in_use = False
        self._step = self._next = step
        self._ticked_in = _NONE  # the backward pass in which the last step was taken
        _listen()
        _clocks.add(self)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        backward = _backward()
        if backward == _NONE or backward > self._ticked_in:
            self._step = self._next
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = self._next = value

    def now(self) -> int:
        """The step, for a layer that trains in it."""
        self._in_use = True
        return self.step

    def tick(self) -> None:
        """Say that the weights were updated."""
        self._by_hand = True
        self._tick()

    def _tick(self) -> None:
        # Said twice it is one step, also by two threads at once.
        self._next = self._step + 1
        self._ticked_in = _backward()
        self._in_use = False
        self.on_step()

    def follow(self, optimizer: Optimizer, parameters: set[int]) -> bool:
        """Count a step of ``optimizer``, if one of its parameters, given by id, is the model's; whether it did."""
        if optimizer not in self._optimizers:
            if not self._owns(parameters):
                return False
            self._optimizers.add(optimizer)
        self._tick()
        return True

    def follow_stranger(self) -> None:
        """Count a step of an optimizer that holds parameters of no compressed model, if it can be this one's."""
        if self._in_use and not self._by_hand and not self._optimizers:
            self._tick()

    def _owns(self, parameters: set[int]) -> bool:
        seen: set[nn.Module] = set()
        return any(
            id(p) in parameters
            for module in _alive(self._modules)
            for _, each in module.named_modules(memo=seen)
            for p in each._parameters.values()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        # A copied model gets a clock of its own. deepcopy enters an object in its memo before it copies the
        # contents, so the copies of the modules around us are already there; a clock copied alone stays with its model.
        twin = Clock(None, self.step)
        twin.on_step = copy.deepcopy(self.on_step, memo)
        modules = list(_alive(self._modules))
        twin._modules = _references([memo[id(m)] for m in modules if id(m) in memo] or modules)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Clock, (None, self.step)


def _nothing() -> None:
    pass


def _backward() -> int:
    """The number of the backward pass that this thread is in, higher for later ones; or :data:`_NONE`."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether this thread is in a backward pass, as what checkpointing computes again is."""
    return _backward() != _NONE


def _references(modules: Iterable[nn.Module]) -> tuple[weakref.ref[nn.Module], ...]:
    return tuple(map(weakref.ref, modules))


def _alive(references: Iterable[weakref.ref[nn.Module]]) -> Iterable[nn.Module]:
    return (module for reference in references if (module := reference()) is not None)


_hook: Any = None


def _listen() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_on_optimizer_step)


def _on_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A GradScaler leaves it to a fused kernel to skip a step. Asking waits for the device, as it does without one.
    if getattr(optimizer, "found_inf", None):
        return
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    clocks = list(_clocks)
    if not any([clock.follow(optimizer, parameters) for clock in clocks]):
        for clock in clocks:
            clock.follow_stranger()
