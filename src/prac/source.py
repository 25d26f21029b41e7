"""What is already kept of a tensor, for the layer that reads it next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor

from prac.estimator import Kept
from prac.ops.normed import Normed


class _Mark(NamedTuple):
    source: Kept | Normed
    version: int  # of the marked tensor then
    width: int

    def __reduce__(self) -> Any:
        """Saved with a tensor (``torch.save`` of an output), it is nothing, in what every loader takes."""
        return OrderedDict, ()


def mark(y: Tensor, source: Kept | Normed, *, width: int | None = None) -> Tensor:
    """Note on the output of a layer from what it can be had again. Returns ``y``.

    What is kept has rows of ``width`` features, as ``y`` lies in memory; by default those of its last dimension.
    """
    # On the tensor object itself: whoever reads this very tensor finds it, and a changed copy has none.
    y._prac_source = _Mark(source, y._version, width or y.shape[-1])  # type: ignore[attr-defined]
    return y


def remark(y: Tensor, x: Tensor) -> Tensor:
    """Note on ``y``, which has the numbers of ``x``, what is noted on ``x``. Returns ``y``."""
    source = source_of(x)
    return y if source is None else mark(y, source)


def source_of(x: Tensor) -> Kept | Normed | None:
    """What is kept of ``x``, if it is a marked tensor and nobody changed it since."""
    found = getattr(x, "_prac_source", None)
    if found is None and x._base is not None and x.numel() == x._base.numel() and x.is_contiguous():
        # Another view of the whole of it, such as attention's heads folded into one dimension.
        found = getattr(x._base, "_prac_source", None)
    if not isinstance(found, _Mark) or (found.version, found.width) != (x._version, x.shape[-1]):
        return None
    return found.source
