"""What is already kept of a tensor, for the layer that reads it next."""

from __future__ import annotations

from torch import Tensor

from prac.estimator import Kept
from prac.ops.normed import Normed

Source = Kept | Normed


def mark(y: Tensor, source: Source) -> Tensor:
    """Note on the output of a layer from what it can be had again. Returns ``y``."""
    # On the tensor object itself: whoever reads this very tensor finds it, and a changed copy has none.
    y._prac_source = (source, y._version)  # type: ignore[attr-defined]
    return y


def source_of(x: Tensor) -> Source | None:
    """What is kept of ``x``, if it is a marked tensor and nobody changed it since."""
    found = getattr(x, "_prac_source", None)
    if found is None and x._base is not None and x.numel() == x._base.numel() and x.is_contiguous():
        # Attention's heads folded into one dimension: another shape of the same row-major memory.
        found = getattr(x._base, "_prac_source", None) if x._base.is_contiguous() else None
    if found is None or found[1] != x._version:
        return None
    source: Source = found[0]
    return source
