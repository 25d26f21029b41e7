"""Memory seen from outside: storages by weak references, whoever holds them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref, int]] = {}
        self.known: dict[int, weakref.ref] = {}  # of others; while they live, for addresses are used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                storage = given.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.known:
                    self.known[key] = weakref.ref(storage, lambda _, key=key: self.known.pop(key, None))
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.alive:
                    free = weakref.ref(storage, lambda _, key=key: self.alive.pop(key, None))
                    self.alive[key] = (free, storage.nbytes())
        return out


def live_bytes(forward: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that ``forward`` made and that are alive when it has returned, and what it returned."""
    with _Storages() as storages:
        output = forward()
    return sum(size for _, size in storages.alive.values()), output
