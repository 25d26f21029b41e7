"""What is already kept of a tensor, for the layer that reads it next."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from prac.estimators.base import Kept
from prac.ops.shared_norm import Normed


class _Mark:
    """On a tensor; ``source`` becomes None as soon as nobody else keeps that any more, so that the tensor does not.

    That is when the backward of what made it has run, or, where checkpointing hides what is kept, when its block ends.
    """

    def __init__(self, source: Kept | Normed, version: int, width: int) -> None:
        self.source: Kept | Normed | None = source
        self.version, self.width = version, width  # of the marked tensor then
        hooks = saving_hooks()
        can = hooks is not None and type(hooks[0]).__weakrefoffset__
        self._block = weakref.ref(hooks[0]) if can else None

    def end_after(self, node: Any) -> None:
        """Release it when the backward of ``node`` has run."""
        note = weakref.ref(self)

        def release(*_: Any) -> None:
            if (mark := note()) is not None:
                mark.source = None

        node.register_hook(release)

    def check(self) -> None:
        """Release it if the block in which it was made has ended."""
        hooks = saving_hooks()
        if self._block is None or (hooks is not None and hooks[0] is self._block()):
            return
        if all(pack is not self._block() for pack, _ in _all_hooks()):
            self.source = None

    def __reduce__(self) -> Any:
        """Saved with a tensor (``torch.save`` of an output), it is nothing, in what every loader takes."""
        return OrderedDict, ()


def mark(y: Tensor, source: Kept | Normed, *, width: int | None = None) -> Tensor:
    """Note on the output of a layer from what it can be had again. Returns ``y``.

    What is kept has rows of ``width`` features, as ``y`` lies in memory; by default those of its last dimension.
    """
    # On the tensor object itself: whoever reads this very tensor finds it, and a changed copy has none.
    y._prac_source = note = _Mark(source, y._version, width or y.shape[-1])  # type: ignore[attr-defined]
    if y.grad_fn is not None:
        note.end_after(y.grad_fn)
    return y


def saving_hooks() -> Any:
    """The innermost (pack, unpack) of those on saved tensors; None without."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _all_hooks() -> list[Any]:
    """All of them. torch shows the innermost alone, so they are taken off and put back."""
    found = []
    while (hooks := saving_hooks()) is not None:
        found.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for hooks in reversed(found):
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return found


def remark(y: Tensor, x: Tensor) -> Tensor:
    """Note on ``y``, which has the numbers of ``x``, what is noted on ``x``. Returns ``y``."""
    source = source_of(x)
    return y if source is None else mark(y, source)


def source_of(x: Tensor) -> Kept | Normed | None:
    """What is kept of ``x``, if it is a marked tensor and nobody changed it since."""
    found = _mark_of(x)
    return None if found is None else found.source


def is_past(x: Tensor) -> bool:
    """Whether what was kept of ``x`` is not any more: it was made in a block that checkpointing computes again."""
    found = _mark_of(x)
    return found is not None and found.source is None


def _mark_of(x: Tensor) -> _Mark | None:
    found = getattr(x, "_prac_source", None)
    if found is None and x._base is not None and x.numel() == x._base.numel() and x.is_contiguous():
        # Another view of the whole of it, such as attention's heads folded into one dimension.
        found = getattr(x._base, "_prac_source", None)
    if not isinstance(found, _Mark) or (found.version, found.width) != (x._version, x.shape[-1]):
        return None
    found.check()
    return found


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Alias", "T", "Slice")
_KEPT = ("_raw_saved_output", "_raw_saved_out", "_raw_saved_result")


def may_be_kept(x: Tensor) -> bool:
    """Whether the operation that made ``x`` keeps it; True as well where that is not torch's own and cannot be told."""
    node: Any = x.grad_fn
    while node is not None and type(node).__name__.rstrip("0123456789").removesuffix("Backward") in _VIEWS:
        node = node.next_functions[0][0]
    if node is None or isinstance(node, torch._C._FunctionBase):
        return True
    return any(hasattr(type(node), name) for name in _KEPT)
