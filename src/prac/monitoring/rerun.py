"""A call of a model in training, remembered so that it can be run again, back from the gradients that it got."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from prac.runtime.autocast import autocast_of
from prac.runtime.running import modes_kept


class Call:
    """The inputs of a call, and the gradients that its outputs got.

    Attributes:
        inputs: (args, kwargs), detached.
        grads: gradients of the outputs, by the number of the tensor among the leaves of the output.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = tree_map(_detached, (args, kwargs))
        self.grads: dict[int, Tensor] = {}
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        parameters = list(model.parameters())
        self._device = parameters[0].device
        self._sharded = any(hasattr(p, "full_tensor") for p in parameters)
        self._autocast = autocast_of(self._device.type)

    def watch(self, output: Any) -> Any:
        """The output, whose gradients are remembered when there are any.

        Its tensors are views of the model's, so that what the model itself computes from one of them (a loss from
        logits) is not counted for what is done with it outside. A scalar is a copy: losses are changed in place, and
        then the hook of a view is never called.
        """
        leaves, tree = tree_flatten(output, is_leaf=_is_leaf)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                alias = leaf.view_as(leaf) if leaf.dim() else leaf.clone()
                alias.register_hook(self._keeper(number))
                leaves[number] = alias
        return tree_unflatten(leaves, tree)

    def _keeper(self, number: int) -> Any:
        def keep(grad: Tensor) -> None:
            self.grads[number] = grad.detach()

        return keep

    def backward(self, output: Any, grads: dict[int, Tensor]) -> None:
        """Backward from an output, given the gradients of its tensors."""
        leaves = tree_leaves(output, is_leaf=_is_leaf)
        torch.autograd.backward([leaves[i] for i in grads], list(grads.values()))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Modes and autocast inside the block are those of the call; the random numbers drawn are given back."""
        devices = [self._device] if self._device.type == "cuda" else []
        autocast = torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None)
        with modes_kept(self._model), torch.random.fork_rng(devices), torch.enable_grad(), autocast:
            for module, training in self._modes:
                module.training = training
            yield

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


def _is_leaf(output: Any) -> bool:
    """Everything but containers: what else a model returns, such as a cache, is handed on as it is."""
    return not isinstance(output, Mapping | list | tuple)


def _rows(rows: int, start: int, end: int) -> Any:
    """A function that cuts what has as many rows, and leaves everything else alone."""

    def cut(leaf: Any) -> Any:
        return leaf[start:end] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows else leaf

    return cut


def _detached(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
