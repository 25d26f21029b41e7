"""A call of a model in training, remembered so that it can be run again, back from the gradients that it got."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Call:
    """The inputs of a call, and the gradients that its outputs got.

    Attributes:
        inputs: (args, kwargs), detached.
        grads: gradients of the outputs, by the number of the tensor among the leaves of the output.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = tree_map(_detached, (args, kwargs))
        self.grads: dict[int, Tensor] = {}
        self._modes = [(module, module.training) for module in model.modules()]
        parameters = list(model.parameters())
        self._device = parameters[0].device
        self._sharded = any(hasattr(p, "full_tensor") for p in parameters)
        kind = self._device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def watch(self, output: Any) -> None:
        """Remember the gradients of the outputs when there are any."""
        for number, tensor in enumerate(tree_leaves(output)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._keeper(number))

    def _keeper(self, number: int) -> Any:
        def keep(grad: Tensor) -> None:
            self.grads[number] = grad.detach()

        return keep

    @contextmanager
    def again(self) -> Iterator[None]:
        """Modes and autocast inside the block are those of the call; the random numbers drawn are given back."""
        modes = [(module, module.training) for module, _ in self._modes]
        devices = [self._device] if self._device.type == "cuda" else []
        autocast = torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None)
        with torch.random.fork_rng(devices), torch.enable_grad(), autocast:
            _set_modes(self._modes)
            try:
                yield
            finally:
                _set_modes(modes)

    def parts(self, count: int) -> list[tuple[Any, Any, dict[int, Tensor]]]:
        """Args, kwargs and outputs' gradients of ``count`` parts of the rows: of fewer, where there are not as many."""
        sizes = [t.shape[0] for t in tree_leaves(self.inputs) if isinstance(t, Tensor) and t.dim()]
        whole = not sizes or any(g.dim() and g.shape[0] != sizes[0] for g in self.grads.values())
        rows = 1 if whole else sizes[0]
        count = self._everywhere(min(count, rows))
        if count == 1:
            return [(*self.inputs, self.grads)]
        bounds = [rows * i // count for i in range(count + 1)]
        found = []
        for start, end in itertools.pairwise(bounds):
            cut = _rows(rows, start, end)
            found.append((*tree_map(cut, self.inputs), {i: cut(g) for i, g in self.grads.items()}))
        return found

    def _everywhere(self, count: int) -> int:
        """The least of all processes, where weights are sharded and so all of them have to run as often."""
        if not self._sharded:
            return count
        least = torch.tensor(count, device=self._device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)


def backward(leaves: list[Any], outer: dict[int, Tensor]) -> None:
    """From the outputs, as the leaves of their tree, given their gradients."""
    torch.autograd.backward([leaves[i] for i in outer], list(outer.values()))


def _rows(rows: int, start: int, end: int) -> Any:
    """A function that cuts what has as many rows, and leaves everything else alone."""

    def cut(leaf: Any) -> Any:
        return leaf[start:end] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows else leaf

    return cut


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _detached(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
