"""What training keeps and what outlives it, counted without any of prac's own accounting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tensors: Iterable[Any]) -> set[int]:
    """The storages of those that are tensors."""
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}


class Living(TorchDispatchMode):
    """Follows every storage that an operation makes inside the block, by weak reference.

    Hooks on saved tensors do not show what is held by an attribute, a mark or a closure; this does, and what operators
    keep in C++ as well, since everything that they keep was once an output of an operation.

    Args:
        known: tensors that are not counted, such as parameters and the batch.
    """

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self._known = storages(known)
        self._made: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    # An address that was freed and is used again replaces what was there.
                    self._made[storage._cdata] = (storage.nbytes(), weakref.ref(storage))
        return out

    def bytes(self, without: Iterable[Any] = ()) -> int:
        """Of what is alive now, but for the storages of some tensors."""
        less = storages(without)
        return sum(size for key, (size, ref) in self._made.items() if key not in less and ref() is not None)


@dataclass
class Saved:
    """What autograd's hooks on saved tensors show, each storage once, and who saved it."""

    found: dict[int, Tensor] = field(default_factory=dict)
    savers: dict[int, set[str]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Their sum."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.found.values())

    def of(self, name: str) -> tuple[int, int]:
        """Bytes that nobody saved but one module, and all that it saved: what a layer costs lies in between."""
        sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in self.found.items()}
        every = [key for key, names in self.savers.items() if name in names]
        return sum(sizes[key] for key in every if len(self.savers[key]) == 1), sum(sizes[key] for key in every)


@contextmanager
def saved(known: Iterable[Any], running: Sequence[str] = ("",)) -> Iterator[Saved]:
    """Count what autograd saves inside the block, but for the storages of ``known``.

    Args:
        known: tensors that are not counted.
        running: names of the modules that run, the innermost last, kept up to date by somebody else.
    """
    kept, owned = Saved(), storages(known)

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in owned:
            kept.found.setdefault(key, tensor.detach())
            kept.savers.setdefault(key, set()).add(running[-1])
        return tensor if tensor.grad_fn is None else tensor.detach()  # an output that its node saves is a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class Rows:
    """How many rows (tokens) each module of a model read, by name: of a model without prac, since it hooks on."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[str, int] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._count(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]

    def _count(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = next(
                (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()), None
            )
            if read is not None and read.dim() > 0:
                self.of[name] = self.of.get(name, 0) + read.numel() // max(1, read.shape[-1])

        return hook

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector does not run inside the block but where it is called, and finds nothing old there."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
