"""How large a batch fits, and how a budget is read."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prac.config import Config
from prac.memory.predict import predict
from prac.runtime.running import Example, tensors_in


def largest_batch(
    model: nn.Module,
    batch: Example,
    budget: int | float | str,
    config: Config | str | None = None,
    **how: Any,
) -> int:
    """The most samples (rows of ``batch``'s tensors) with which a training step fits ``budget``; 0 if not one does.

    The peak grows linearly with the batch from some size on; this goes by that and checks what it finds.

    Args:
        model: as for :func:`prac.predict`.
        batch: as an example; its tensors are made longer or shorter.
        budget: as for :func:`prac.compress`.
        config: as for :func:`prac.predict`.
        **how: the rest of what :func:`prac.predict` takes.
    """
    limit = parse_budget(budget)
    rows = rows_of(batch)

    @functools.cache
    def peak(count: int) -> int:
        resized = tree_map_only(
            Tensor,
            lambda t: (
                torch.empty(count, *t.shape[1:], dtype=t.dtype, device="meta") if t.dim() and len(t) == rows else t
            ),
            batch,
        )
        return predict(model, resized, config, **how).peak

    if peak(1) > limit:
        return 0
    low, high = 1, max(2, rows)
    while peak(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:  # low fits, high does not; try where the line through both meets the budget
        guess = low + int((high - low) * (limit - peak(low)) / (peak(high) - peak(low)))
        guess = min(high - 1, max(low + 1, guess))
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
    return low


def parse_budget(budget: int | float | str) -> int:
    """Bytes of ``"24GiB"``, ``"80 GB"``, ``"512 MiB"``, ``"1e9"`` or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(budget, int | float) and not isinstance(budget, bool) and 1 <= budget < math.inf:
        return int(budget)
    match = (
        None
        if not isinstance(budget, str)
        else re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", budget, re.IGNORECASE)
    )
    if match is None:
        raise ValueError(f"a budget is a number of bytes above 0 or text such as 24GiB or 80GB, got {budget!r}.")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    found = float(number) * (1024 if binary else 1000) ** power
    if not math.isfinite(found):
        raise ValueError(f"a budget of {budget!r} is more than a number can say.")
    count = int(found)
    if not count:
        raise ValueError(f"a budget of {budget!r} is no memory at all.")
    return count


def rows_of(batch: Example) -> int:
    """Samples in a batch: the first dimension of most of its tensors (patches and positions have others).

    Raises:
        ValueError: if it has no tensor with a dimension.
    """
    first = Counter(len(tensor) for tensor in tensors_in(batch) if tensor.dim())
    if not first:
        raise ValueError(f"this batch, a {type(batch).__name__}, has no tensor whose rows could be counted.")
    return first.most_common(1)[0][0]
