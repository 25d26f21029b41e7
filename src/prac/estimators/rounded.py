"""The estimator that keeps every direction: in full, or rounded to few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.base import Estimator, Form, Kept
from prac.estimators.clock import Clock
from prac.estimators.codes import Codes, Coding, Tensors, bytes_per_token, dither, load, store
from prac.runtime.kernel import fused

_store, _load = fused(store), fused(load)


@dataclass(frozen=True)
class Rounded(Form):
    """The form of a tensor of n features rounded to ``bits`` (None: kept as it is)."""

    complete: ClassVar[bool] = True
    bits: Bits | None
    n: int
    dtype: torch.dtype

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The tensor, rounded, (M, n)."""
        return _load(self.codes(tensors), self.dtype)

    def codes(self, tensors: Tensors) -> Codes:
        """The tensor as it was written."""
        return Codes(tensors, self.bits, self.n)


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

    Raises:
        ValueError: for companded bits that are to be unbiased, which they cannot be.
    """

    complete: ClassVar[bool] = True

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
        if bits is not None and bits.compand and unbiased:
            raise ValueError(
                f"{name}: companded codes are biased, and this is rounded without bias: write Bits({bits.bits}) here, "
                "and Bits(…, compand=True) for activation alone."
            )
        self.bits, self.unbiased, self.width = bits, unbiased, width

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """Round (M, n)."""
        m, n = x_MN.shape
        return self.written(_store(x_MN.to(dtype), self.coding(m, n, x_MN.device)), n, dtype)

    def coding(self, m: int, n: int, device: torch.device) -> Coding:
        """The bits; with fresh random numbers for m × n values unless rounding is to nearest."""
        if not self.unbiased or self.bits is None or self.bits.bits >= 16:
            return Coding(self.bits)
        return Coding(self.bits, dither(m, n, self.bits, device, self.next_generator(device)))

    def written(self, tensors: Tensors, n: int, dtype: torch.dtype) -> Kept:
        """What :func:`prac.estimators.codes.store` returned, with how to read it."""
        self.width, self.kept_in = n, dtype
        return Kept(tensors, Rounded(self.bits, n, dtype))

    def label(self) -> str:
        """``4 bits``."""
        return "in full" if self.bits is None else self.bits.label

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes kept of a token."""
        return bytes_per_token(self.width or 0, self.bits, itemsize)
