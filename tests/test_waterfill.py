"""The choice of one option for each tensor, against every other."""

from __future__ import annotations

import itertools
import random

from prac.allocation.waterfill import Option, fill, hull
from prac.config import Bits


def instance(draw: random.Random) -> list[list[Option]]:
    return [
        [Option(Bits(), draw.randint(1, 30), draw.choice((0.0, draw.random())) * draw.choice((1, 100)))
         for _ in range(draw.randint(1, 6))]
        for _ in range(draw.randint(1, 4))
    ]  # fmt: skip


def relaxed(tensors: list[list[Option]], budget: int) -> float:
    """The optimum where options may be mixed, as the best of all Lagrange bounds: it is attained at some slope."""
    slopes = {0.0}
    for options in tensors:
        for a, b in itertools.combinations(options, 2):
            if a.bytes != b.bytes:
                slopes.add(max(0.0, (a.variance - b.variance) / (b.bytes - a.bytes)))
    return max(
        sum(min(option.variance + slope * option.bytes for option in options) for options in tensors) - slope * budget
        for slope in slopes
    )


def test_the_choice_against_every_other() -> None:
    """500 small instances: within the budget, and within one step of the hulls of the best there is."""
    draw, optimal, feasible = random.Random(0), 0, 0
    for _ in range(500):
        tensors, budget = instance(draw), draw.randint(1, 90)
        chosen = fill(tensors, budget)
        fitting = [c for c in itertools.product(*tensors) if sum(o.bytes for o in c) <= budget]
        assert (chosen is None) == (not fitting)
        if chosen is None:
            continue
        assert all(option in options for option, options in zip(chosen, tensors, strict=True))
        assert sum(option.bytes for option in chosen) <= budget
        variance, best = (
            sum(o.variance for o in c) for c in (chosen, min(fitting, key=lambda c: sum(o.variance for o in c)))
        )
        steps = [a.variance - b.variance for options in tensors for a, b in itertools.pairwise(hull(options))]
        bound = relaxed(tensors, budget)
        assert bound <= best + 1e-9
        assert best - 1e-9 <= variance <= bound + max(steps, default=0.0) + 1e-9
        known = draw.choice(fitting)
        assert sum(o.variance for o in fill(tensors, budget, known)) <= sum(o.variance for o in known) + 1e-12
        feasible, optimal = feasible + 1, optimal + (variance <= best + 1e-12)
    assert feasible > 300
    assert optimal > 0.85 * feasible


def test_a_hull_is_convex_and_under_every_option() -> None:
    draw = random.Random(1)
    for options in itertools.chain.from_iterable(instance(draw) for _ in range(200)):
        found = hull(options)
        slopes = [(a.variance - b.variance) / (b.bytes - a.bytes) for a, b in itertools.pairwise(found)]
        assert all(a > b > 0 for a, b in itertools.pairwise([*slopes, 1e-300]))
        for option in options:
            for a, b in itertools.pairwise(found):
                if a.bytes <= option.bytes <= b.bytes:
                    share = (option.bytes - a.bytes) / (b.bytes - a.bytes)
                    assert option.variance >= a.variance + share * (b.variance - a.variance) - 1e-9
        assert min(o.variance for o in options) == found[-1].variance
        assert min(o.bytes for o in options) == found[0].bytes
