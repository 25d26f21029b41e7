"""Which of several options to take of each tensor, so that the least variance is left for a budget of bytes.

Minimise Σ variance subject to Σ bytes ≤ budget. Where options may be mixed, each tensor's best variance is the lower
convex hull of its options, and the optimum has one slope (the Lagrange multiplier λ): every tensor goes down its hull
as long as a byte there buys more than λ, and one of them stops midway. :func:`fill` does that, without the midway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from prac.config import Bits, Rank

# What has a variance in closed form.
Choice = Rank | Bits


class Option(NamedTuple):
    """One way to keep a tensor."""

    keep: Choice
    bytes: int  # per token
    variance: float


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull: from the cheapest option on, each step buys less variance per byte than the one before."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.variance)):
        if found and option.variance >= found[-1].variance:
            continue
        while len(found) > 1 and _slope(found[-1], option) >= _slope(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _slope(a: Option, b: Option) -> float:
    """Variance bought per byte from a to b."""
    return (a.variance - b.variance) / (b.bytes - a.bytes)


def fill(tensors: Sequence[Sequence[Option]], budget: int, instead: Sequence[Option] = ()) -> list[Option] | None:
    """One option of each tensor within ``budget`` bytes per token; None where even the cheapest take more.

    Takes the steps of all hulls by decreasing slope for as long as they fit. Its variance is above the least possible
    by at most what the first step that did not fit would have bought: to that step the relaxed problem's optimum, which
    no choice can beat, does the same, and then takes a part of it. The rest of the budget is spent on whatever single
    change helps most.

    ``instead`` is some choice, one of each tensor's options: the result is never worse than that where it fits.
    """
    hulls = [hull(options) for options in tensors]
    chosen = [each[0] for each in hulls]
    left = budget - sum(option.bytes for option in chosen)
    if left < 0:
        return None
    steps = [(_slope(a, b), i, a, b) for i, each in enumerate(hulls) for a, b in pairwise(each)]
    for _, i, a, b in sorted(steps, key=lambda step: -step[0]):
        if chosen[i] is a and b.bytes - a.bytes <= left:
            chosen[i] = b
            left -= b.bytes - a.bytes
    while (change := _best_change(tensors, chosen, left)) is not None:
        i, option = change
        left -= option.bytes - chosen[i].bytes
        chosen[i] = option
    known = instead and all(option in options for option, options in zip(instead, tensors, strict=True))
    if known and sum(option.bytes for option in instead) <= budget and _total(instead) < _total(chosen):
        return list(instead)
    return chosen


def _best_change(tensors: Sequence[Sequence[Option]], chosen: Sequence[Option], left: int) -> tuple[int, Option] | None:
    """The tensor and its option that lower the variance most for at most ``left`` bytes more; None if none does."""
    gain, best = 0.0, None
    for i, options in enumerate(tensors):
        for option in options:
            if option.bytes - chosen[i].bytes <= left and chosen[i].variance - option.variance > gain:
                gain, best = chosen[i].variance - option.variance, (i, option)
    return best


def _total(options: Sequence[Option]) -> float:
    return math.fsum(option.variance for option in options)
