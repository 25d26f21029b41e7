"""How to run a stranger's model: with what, in which mode, and knowing what is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def call(model: nn.Module, example: Example) -> Any:
    """``model(tensor)``, ``model(*sequence)`` or ``model(**mapping)``."""
    args, kwargs = as_call(example)
    return model(*args, **kwargs)


def as_call(example: Example) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments, by position and by name, that an example stands for."""
    if isinstance(example, Mapping):
        return (), example
    if not isinstance(example, Tensor | Sequence) or isinstance(example, str):
        raise TypeError(
            "a batch is a tensor, a sequence of positional arguments or a mapping of keyword arguments, got "
            f"{type(example).__name__}."
        )
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def loss_of(output: Any, objective: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The scalar to differentiate: ``objective`` of the output; without one the output's ``loss``, or itself.

    Raises:
        ValueError: if there is none.
    """
    if objective is not None:
        scalar: Any = objective(output)
        if not isinstance(scalar, Tensor) or scalar.dim() > 0:
            found = f"a tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            raise ValueError(f"the objective has to give a tensor with one number and no dimension, it gave {found}.")
        if torch.is_grad_enabled() and not scalar.requires_grad:
            raise ValueError("the objective gives a scalar that no parameter has a part in: there is nothing to train.")
        return scalar
    value = output
    if not isinstance(value, Tensor):
        value = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
    if not isinstance(value, Tensor) or value.dim() > 0:
        raise ValueError(
            "the model's output has no loss: put labels into the batch, or give a function of the output (objective=)."
        )
    return value


@contextmanager
def running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules of ``model`` that run, the innermost last, kept up to date inside the block.

    It begins with ``""`` for what runs outside of them. Layers that run as one operation do so also while they are
    watched.
    """
    names = [""]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            names.append(name)

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        names.pop()

    leave.only_counts = True  # type: ignore[attr-defined]
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            continue
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    model = module = None  # type: ignore[assignment]  # where nobody leaves the block, it does not live on by this
    try:
        yield names
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode, each module's own mode put back afterwards."""
    with modes_kept(model):
        model.train(training)
        yield


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts the numbers in its buffers back, whatever the block changes."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module's own mode back, whatever the block changes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists and mappings, and in what plain objects hold."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    elif not isinstance(tree, list | tuple | type | nn.Module) and hasattr(tree, "__dict__"):
        tree = [value for value in vars(tree).values() if isinstance(value, Tensor | Mapping | list | tuple)]
    return [t for item in tree for t in tensors_in(item)] if isinstance(tree, list | tuple) else []
