"""How a tensor is kept between forward and backward, and used again.

An :class:`Estimator` belongs to a layer and compresses; what it returns is a :class:`Kept`, which
an op saves and asks again in backward. Ops know nothing else about compression.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prac.estimators.clock import Clock
from prac.runtime.autocast import without_autocast
from prac.runtime.processes import process

Tensors = tuple[Tensor, ...]


class Form(Protocol):
    """What kept tensors stand for. Holds nothing that grows with the number of tokens."""

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The estimate of the tensor kept, (M, n)."""
        ...

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """The estimate of ``dyᵀ x``, (O, n)."""
        ...


class Kept(NamedTuple):
    """A compressed activation.

    ``tensors`` go through autograd's own saving, so that checkpointing, offloading and
    accounting see them; ``form`` says how to read them.
    """

    tensors: Tensors
    form: Form

    def reconstruct(self) -> Tensor:
        """The estimate of the tensor kept, (M, n), for ops that are not linear in it."""
        return self.form.reconstruct(self.tensors)

    def weight_grad(self, dy_MO: Tensor) -> Tensor:
        """The estimate of ``dyᵀ x``, (O, n), the weight gradient of a linear layer that read x."""
        return self.form.weight_grad(dy_MO, self.tensors)


class _Last(NamedTuple):
    """The tensor compressed last, and what came of it; neither is kept alive by this."""

    x: weakref.ref[Tensor]
    key: tuple[Any, ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    form: Form


class Estimator:
    """Compresses one activation, or one activation shared by several layers.

    Args:
        clock: counts the optimizer steps.
        name: of the layer, for messages and for the seed.
        seed: with the name, a counter and the distributed rank, this seeds each draw, so that
            runs repeat and resume exactly, while the noise of data-parallel ranks is
            independent and averages out.
    """

    def __init__(self, clock: Clock, *, name: str = "", seed: int = 0) -> None:
        self.clock, self.name, self.seed = clock, name, seed
        self.width: int | None = None
        self.kept_in: torch.dtype | None = None  # the dtype in which it took what it kept last
        self.observer: Callable[[Tensor, Kept], None] | None = None
        self.draws = (0, 0)  # the step, and how often it drew in it
        self._last: _Last | None = None

    @torch.no_grad()
    def keep(self, x: Tensor, dtype: torch.dtype | None = None) -> Kept:
        """Compress ``x`` (..., n), in ``dtype`` if given.

        Layers that read the same tensor get the same result: the last one is remembered for as
        long as both it and its input are alive (Section 5.1, "Subspace Sharing").
        """
        dtype = self.kept_in = dtype or x.dtype
        key = (x._version, self.clock.now(), dtype)
        kept = self._recall(x, key)
        if kept is None:
            with without_autocast(x.device.type):
                kept = self.compress(x.reshape(-1, x.shape[-1]), dtype)
            self._last = _Last(weakref.ref(x), key, tuple(map(weakref.ref, kept.tensors)), kept.form)
        if self.observer is not None:
            self.observer(x, kept)
        return kept

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """What :meth:`keep` does where it remembers nothing."""
        raise NotImplementedError

    def label(self) -> str:
        """How it keeps, in a few words."""
        raise NotImplementedError

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes kept of a token whose features have ``itemsize`` bytes each."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""

    def generator(self, count: Any, device: torch.device) -> torch.Generator:
        """A generator for draw number ``count``."""
        key = f"{self.seed}/{self.name}/{count}/{process()}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        return torch.Generator(device=device).manual_seed(seed)

    def next_generator(self, device: torch.device) -> torch.Generator:
        """A generator for the next draw of this step."""
        step, count = self.draws
        now = self.clock.now()
        self.draws = (now, count + 1 if step == now else 0)
        return self.generator(self.draws, device)

    def _recall(self, x: Tensor, key: tuple[Any, ...]) -> Kept | None:
        last = self._last
        if last is None or last.x() is not x or last.key != key:
            return None
        tensors = tuple(t for ref in last.tensors if (t := ref()) is not None)
        return Kept(tensors, last.form) if len(tensors) == len(last.tensors) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Estimator:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.clock = copy.deepcopy(self.clock, memo)
        twin._last = twin.observer = None
        return twin
