"""The step t of Algorithm 1: optimizer steps, counted without the user's help."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()


class Clock:
    """Counts the optimizer steps taken on one model.

    Refreshes follow optimizer steps, not forward passes: gradient accumulation runs many
    forwards per step, and recomputation under checkpointing must see the same P. Every
    ``torch.optim`` optimizer reports its steps through one global hook; a clock listens to
    those that own a parameter of its model. The count moves at the first use *after* a
    step, so two optimizers that share a model (Muon for matrices, AdamW for the rest)
    still make one step.

    Loops that update weights by hand, without ``torch.optim``, call :meth:`tick`.
    """

    def __init__(self, model: nn.Module, step: int = 0) -> None:
        self._model = weakref.ref(model)
        self._step = step
        self._ticked = False
        if not _clocks:
            _listen()
        _clocks.add(self)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        if self._ticked:
            self._step += 1
            self._ticked = False
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        self._ticked = False

    def tick(self) -> None:
        """Say that the weights were updated."""
        self._ticked = True

    def owns(self, parameters: set[int]) -> bool:
        """Whether any of these parameters, given by id, is the model's."""
        model = self._model()
        return model is not None and any(id(p) in parameters for p in model.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        # A copied model gets a clock of its own. deepcopy enters an object in its memo
        # before it copies the contents, so the copy of our model is already there.
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this clock is gone, so it cannot be copied.")
        return Clock(memo.get(id(model), model), self.step)


_hook: Any = None


def _listen() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_on_optimizer_step)


def _on_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for clock in list(_clocks):
        if clock.owns(stepped):
            clock.tick()
