"""How many bits q and k need, by the size of the scores that they make."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from prac.config import Bits

# The relative error (r.m.s.) of rounding to the nearest of so many bits, as prac.estimators.codes has it.
_ERROR = {4: 0.09, 6: 0.02, 8: 0.005}
# How far rounding may move a score. At 0.13, which unit-sized q and k have in 4 bits, gradients are off by a sixth.
_TOLERANCE = 0.2


def enough(q: Tensor, k: Tensor, scale: float | None, bits: Bits) -> Bits | None:
    """How to keep q and k so that softmax is not lost in their rounding: as ``bits``, or in more, or None for in full.

    Rounding with a relative error of e moves a score ``q·k · scale`` by about ``√2 e √D · scale`` times the sizes
    (r.m.s.) of q and k. Where scores are not scaled, or training has made them large, 4 bits move them by more than
    softmax can bear.
    """
    if bits.bits not in _ERROR:
        return bits
    d = q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    squares = [torch.linalg.vector_norm(t.detach(), dtype=wide).square() / max(1, t.numel()) for t in (q, k)]
    size = (squares[0] * squares[1]).sqrt().item() * (2 * d) ** 0.5 * (d**-0.5 if scale is None else abs(scale))
    able = [b for b in sorted(_ERROR) if b >= bits.bits and size * _ERROR[b] <= _TOLERANCE]
    return dataclasses.replace(bits, bits=able[0]) if able else None
