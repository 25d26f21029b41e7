"""Every tensor of a training step, from its making to its freeing, and what it is for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prac.memory.kinds import kinds
from prac.optim.factored import FactoredGradient
from prac.runtime import kernel
from prac.runtime.running import running


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold its numbers: those of a gradient in factors are two."""
    return (tensor.coefficients_OR, tensor.basis_NR) if isinstance(tensor, FactoredGradient) else (tensor,)


@dataclass
class Piece:
    """One storage: its bytes, when it was made and freed (counted in events), and what for."""

    bytes: int
    born: int
    where: str
    module: str
    freed: int | None = None
    kind: str | None = None  # as far as somebody said


class _Saved(NamedTuple):
    tensor: Tensor
    module: str


class Tracker(TorchDispatchMode):
    """Follows the storages that operations make, real or fake, while the block runs.

    What a piece of memory is for often turns out only later, when autograd saves it or when it becomes a gradient. So
    every piece is remembered with its times, and the question what the peak consists of is answered in the end.

    torch has ``MemTracker`` for the same; it cannot tell activations apart, nor take the kernels of
    :mod:`prac.runtime.kernel` for one operation each, as they run. The tests compare the two where both apply.

    Args:
        model: its modules give the names.

    >>> with Tracker(model) as tracker:
    ...     model(**batch).loss.backward()
    >>> tracker.peak()
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.pieces: list[Piece] = []
        self.live = self.highest = 0  # bytes
        self.peak_time = 0
        self.peak_where = ""
        self.phase = "forward"
        self._time = 0
        self._alive: dict[int, tuple[Piece, Any]] = {}
        self._running: list[str] = [""]
        self._backward_of = ""
        self._paused = False
        self._stack = ExitStack()
        self._kinds = kinds(model)

    # --- what others tell ----------------------------------------------------------------

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what tensors are for; those not seen before are taken in."""
        for tensor in tensors:
            if tensor is not None:
                first, *basis = parts(tensor)
                self._piece(first).kind = kind
                for part in basis:  # there for others already
                    self._piece(part).kind = self._piece(part).kind or kind

    def name_rest(self) -> None:
        """At the end of forward: what is alive and was not saved through autograd is kept by other means.

        By checkpointing, which holds the inputs of its blocks, or, where the loss was made, by the loss.
        """
        for piece, _ in self._alive.values():
            if piece.kind is None:
                of = self._kinds.get(piece.module)
                piece.kind = of if of == "logits" else "checkpoint"

    # --- what is asked in the end ----------------------------------------------------------

    def at(self, time: int) -> dict[str, int]:
        """Bytes by kind at a point in time."""
        found: dict[str, int] = {}
        for piece in self.pieces:
            if piece.born <= time and (piece.freed is None or piece.freed > time):
                kind = piece.kind or "temporary"
                found[kind] = found.get(kind, 0) + piece.bytes
        return found

    def now(self) -> int:
        """The present, as :meth:`at` takes it."""
        return self._time

    # --- following ---------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        self._stack.enter_context(kernel.run_by(self._one_kernel))
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._running = self._stack.enter_context(running(self.model))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if FactoredGradient in types:
            return NotImplemented  # its factors come by in a moment
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            self._take_in(out)
        return out

    def _one_kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run what is compiled into one kernel: only what comes out takes memory."""
        self._paused, before = True, self._paused
        try:
            out = function(*args)
        finally:
            self._paused = before
        if not before:
            self._take_in(out)
        return out

    def _take_in(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                for part in parts(tensor):
                    self._piece(part)

    def _piece(self, tensor: Tensor) -> Piece:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return self._alive[key][0]
        self._time += 1
        piece = Piece(storage.nbytes(), self._time, self._where(), self._running[-1])
        self.pieces.append(piece)
        self._alive[key] = (piece, weakref.ref(storage, lambda _: self._free(key)))
        self.live += piece.bytes
        if self.live > self.highest:
            self.highest, self.peak_time, self.peak_where = self.live, self._time, piece.where
        return piece

    def _free(self, key: int) -> None:
        piece, _ = self._alive.pop(key)
        self._time += 1
        piece.freed = self._time
        self.live -= piece.bytes

    def _where(self) -> str:
        in_backward = torch._C._current_graph_task_id() != -1
        name = self._running[-1] or (self._backward_of if in_backward else "")
        phase = "backward" if in_backward else self.phase
        return f"{phase} of {name}" if name else phase

    def _pack(self, tensor: Tensor) -> _Saved:
        piece = self._piece(tensor)
        if piece.kind is None:
            piece.kind = self._kinds.get(self._running[-1], "other")
        return _Saved(tensor, self._running[-1])

    def _unpack(self, saved: _Saved) -> Tensor:
        self._backward_of = saved.module
        return saved.tensor
