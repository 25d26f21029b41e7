"""How a tensor is kept between forward and backward, and used again.

An :class:`Estimator` belongs to a layer and compresses; what it returns is a :class:`Kept`, which
an op saves and asks again in backward. Ops know nothing else about compression.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.clock import Clock
from prac.estimators.codes import Codes, Coding, Tensors
from prac.runtime.autocast import without_autocast
from prac.runtime.processes import process


class Form:
    """What kept tensors stand for. Holds nothing that grows with the number of tokens.

    Attributes:
        complete: whether every direction of the tensor is there, with no error but that of rounding.
    """

    complete: ClassVar[bool] = False

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The estimate of the tensor kept, (M, n)."""
        raise NotImplementedError

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """The estimate of ``dyᵀ x``, (O, n)."""
        return dy_MO.mT @ self.reconstruct(tensors).to(dy_MO.dtype)

    def codes(self, tensors: Tensors) -> Codes:
        """The tensor as kernels read it; written as it is where they cannot read what is kept."""
        x_MN = self.reconstruct(tensors)
        return Codes((x_MN,), None, x_MN.shape[1])


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

    Attributes:
        complete: whether what it keeps is (:attr:`Form.complete`).
        bits: in which it keeps a tensor; None in its own dtype.
        width: n, once it is known.
        kept_in: the dtype in which it took what it kept last.
        observer: called with each tensor that is kept and what is kept of it; nothing is refreshed meanwhile.
        refreshes: how often it made a basis anew.
        renormalise: whether a norm that keeps its input by it scales x̂ to its exact length.

    Args:
        clock: counts the optimizer steps.
        name: of the layer, for messages and for the seed.
        seed: with the name, a counter and the distributed rank, this seeds each draw, so that
            runs repeat and resume exactly, while the noise of data-parallel ranks is
            independent and averages out.
    """

    complete: ClassVar[bool] = False

    def __init__(self, clock: Clock, *, name: str = "", seed: int = 0) -> None:
        self.clock, self.name, self.seed = clock, name, seed
        self.bits: Bits | None = None
        self.width: int | None = None
        self.kept_in: torch.dtype | None = None
        self.observer: Callable[[Tensor, Kept], None] | None = None
        self.refreshes, self.renormalise = 0, False
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

    def coding(self, m: int, n: int, device: torch.device) -> Coding | None:
        """How a kernel is to write m × n values as this estimator would keep them; None where it cannot."""
        return None

    def kept(self, tensors: Tensors, n: int, dtype: torch.dtype, x: Callable[[], Tensor]) -> Kept:
        """What a kernel wrote by :meth:`coding`, with how to read it; ``x`` gives the tensor itself to an observer."""
        kept = self.written(tensors, n, dtype)
        if self.observer is not None:
            self.observer(x(), kept)
        return kept

    def written(self, tensors: Tensors, n: int, dtype: torch.dtype) -> Kept:
        """The same, unobserved."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether it can keep a tensor without making a basis first."""
        return True

    @property
    def remark(self) -> str:
        """What a summary should say of it besides, or ""."""
        return ""

    @property
    def inside(self) -> tuple[Estimator, ...]:
        """Those by which it keeps what it makes."""
        return ()

    def label(self) -> str:
        """How it keeps, in a few words."""
        raise NotImplementedError

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes kept of a token whose features have ``itemsize`` bytes each."""
        raise NotImplementedError

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
