"""How many bits q and k need, by the size of the scores that they make."""

from __future__ import annotations

import torch
from torch import Tensor

from prac.config import Bits

# The relative error (r.m.s.) of rounding to the nearest of so many bits, as prac.estimators.codes has it.
_ERROR = {4: 0.09, 8: 0.005}
# How far rounding may move a score. At 0.13, which unit-sized q and k have in 4 bits, gradients are off by a sixth.
_TOLERANCE = 0.2


def enough(q: Tensor, k: Tensor, scale: float | None, bits: int) -> Bits | None:
    """The bits to keep q and k in so that softmax is not lost in their rounding: ``bits``, or 8, or None for all.

    Rounding with a relative error of e moves a score ``q·k · scale`` by about ``√2 e √D · scale`` times the sizes
    (r.m.s.) of q and k. Where scores are not scaled, or training has made them large, 4 bits move them by more than
    softmax can bear.
    """
    if bits not in _ERROR:
        return Bits(bits)
    d = q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    squares = [torch.linalg.vector_norm(t.detach(), dtype=wide).square() / max(1, t.numel()) for t in (q, k)]
    size = (squares[0] * squares[1]).sqrt().item() * (2 * d) ** 0.5 * (d**-0.5 if scale is None else abs(scale))
    return next((Bits(b) for b in sorted({bits, 8}) if b >= bits and size * _ERROR[b] <= _TOLERANCE), None)
