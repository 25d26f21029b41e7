"""A call of torch's attention, and a kernel that can do it: what the op and the kernels say to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What ``F.scaled_dot_product_attention`` is called with, q (B, H, S, D), k and v (B, H', S', D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    gqa: bool = False

    def for_kernels(self, dtype: torch.dtype) -> Call:
        """The same in ``dtype``, with as many heads of k and v as of q, and a mask that is added to the scores.

        A mask of booleans is made so at each use: what is kept is then the one that all layers share.
        """
        q, k, v, mask = self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.mask
        if self.gqa and q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        return Call(q, k, v, mask, self.dropout, self.causal, self.scale)


class Result(NamedTuple):
    """What a kernel's forward gives, and its backward asks for."""

    out: Tensor  # (B, H, S, D), in memory as (B, S, H, D)
    lse: Tensor  # log-sum-exp of each row of scores
    tensors: tuple[Tensor, ...] = ()  # what else: to be kept,
    numbers: tuple[int, ...] = ()  # or numbers


class Backend(NamedTuple):
    """One kernel of torch, forward and back.

    ``why_not(call)`` says why it cannot do a call, or ""; it knows shapes, dtypes and devices alone. ``forward(call)``
    and ``backward(dout, call, result)``, which gives (dq, dk, dv), take calls :meth:`Call.for_kernels`.
    """

    name: str  # as torch calls it
    number: int  # of torch's SDPBackend
    device: str
    why_not: Callable[[Call], str]
    forward: Callable[[Call], Result]
    backward: Callable[[Tensor, Call, Result], tuple[Tensor, Tensor, Tensor]]
