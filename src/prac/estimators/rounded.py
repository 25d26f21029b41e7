"""The estimator that keeps every direction: in full, or rounded to few bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.base import Estimator, Kept, Tensors
from prac.estimators.clock import Clock
from prac.estimators.codes import Dither, bytes_per_token, dither, load, store
from prac.runtime.kernel import fused

_store, _load = fused(store), fused(load)


class Rounded(NamedTuple):
    """The form of a tensor of n features rounded to ``bits`` (None: kept as it is)."""

    bits: Bits | None
    n: int
    dtype: torch.dtype

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The tensor, rounded, (M, n)."""
        return _load(tensors[0], tensors[1:], self.bits, self.n, self.dtype)

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """``dyᵀ x̃``, (O, n): as unbiased as the rounding."""
        return dy_MO.mT @ self.reconstruct(tensors).to(dy_MO.dtype)


def by_reference(x: Tensor, dtype: torch.dtype) -> Kept:
    """X (..., n) itself, to be read in ``dtype``."""
    n = x.shape[-1]
    return Kept((x.detach().reshape(-1, n).to(dtype),), Rounded(None, n, dtype))


class Stored(Estimator):
    """Keeps x in ``bits``, each group of features with its own scale (see :mod:`prac.estimators.codes`).

    Args:
        bits: None keeps x itself, by reference.
        unbiased: round stochastically, E[x̃] = x, for uses that are linear in x; otherwise to the
            nearest code, which is half the variance and what a nonlinearity wants.
        width: n, features of x; None takes it from the first one seen.
        clock, name, seed: as for :class:`prac.estimators.base.Estimator`.
    """

    def __init__(
        self,
        bits: Bits | None,
        clock: Clock,
        *,
        unbiased: bool,
        width: int | None = None,
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(clock, name=name, seed=seed)
        self.bits, self.unbiased, self.width = bits, unbiased, width

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """Round (M, n)."""
        m, n = x_MN.shape
        return self.kept(_store(x_MN.to(dtype), self.bits, self.noise(m, n, x_MN.device)), n, dtype)

    def kept(self, tensors: Tensors, n: int, dtype: torch.dtype) -> Kept:
        """What :func:`prac.estimators.codes.store` returned, with how to read it."""
        self.width, self.kept_in = n, dtype
        return Kept(tensors, Rounded(self.bits, n, dtype))

    def noise(self, m: int, n: int, device: torch.device) -> Dither | None:
        """Fresh random numbers for m × n values; None where rounding is to nearest."""
        if not self.unbiased or self.bits is None or self.bits.bits >= 16:
            return None
        return dither(m, n, self.bits, device, self.next_generator(device))

    def label(self) -> str:
        """``4 bits``."""
        return "in full" if self.bits is None or self.bits.bits == 32 else f"{self.bits.bits} bits"

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes kept of a token."""
        return bytes_per_token(self.width or 0, self.bits, itemsize)
