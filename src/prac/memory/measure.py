"""How many bytes autograd keeps for backward, counted on a real forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class KeptBytes:
    """Bytes kept for backward, by the innermost module that was running when they were saved."""

    by_module: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Their sum: every storage once, whoever saves it again."""
        return sum(self.by_module.values())


@contextmanager
def track_kept(model: nn.Module) -> Iterator[KeptBytes]:
    """Count what autograd saves while the block runs ``model``'s forward pass.

    Each storage counts once, with its whole size, for the module that saved it first, and
    only if it was made during the block: parameters, buffers, the batch itself and the
    subspaces' P, which exist once however large the batch, are not activations. What is
    saved outside any module of ``model`` (a loss, say) counts under the name ``""``.

    >>> with track_kept(model) as kept:
    ...     loss = model(**batch).loss
    >>> kept.total
    """
    kept = KeptBytes()
    owned = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    # Holding on to what was saved keeps its address from being given to another tensor.
    counted: dict[int, Tensor] = {}
    running = [""]

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in owned and key not in counted and not (tensor.is_leaf and tensor.requires_grad):
            counted[key] = tensor.detach()
            name = running[-1]
            kept.by_module[name] = kept.by_module.get(name, 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            running.append(name)

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    # Layers that run as one operation do so also while they are counted.
    leave.only_counts = True  # type: ignore[attr-defined]

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
        counted.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
