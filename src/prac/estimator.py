"""What an op asks of whatever keeps its input: three questions."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Kept(NamedTuple):
    """A compressed activation.

    ``tensors`` grow with the number of tokens and go through autograd's own saving, so
    that checkpointing, offloading and accounting see them. ``basis`` is shared by all
    tokens and steps and is only referenced.
    """

    tensors: tuple[Tensor, ...]
    basis: Tensor


class Estimator(Protocol):
    """How a tensor is kept between forward and backward, and used again.

    Ops hold one of these and know nothing else about compression.
    """

    def keep(self, x: Tensor, dtype: torch.dtype | None = None) -> Kept:
        """Compress ``x`` (..., n), in ``dtype`` if given. Called once per forward."""
        ...

    def weight_grad(self, dy_MO: Tensor, kept: Kept) -> Tensor:
        """The estimate of ``dyᵀ x``, shape (O, n), without rebuilding ``x``."""
        ...

    def reconstruct(self, kept: Kept) -> Tensor:
        """The estimate of ``x``, shape (M, n), for ops that are not linear in it."""
        ...
