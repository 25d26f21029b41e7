"""What a claim of the paper amounts to here: a difference measured seed by seed, and whether it is below a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prac.lab.report import results

CONFIRMED, NOT_CONFIRMED, WITHIN, MISSING = "confirmed", "not confirmed", "within the spread", "not measured"


@dataclass(frozen=True)
class Gap:
    """A number measured with its 95% interval ``mean ± half``; ``spread`` is what is printed after the ±."""

    mean: float
    spread: float | None
    half: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Gap:
        """Of independent repetitions, one for each seed: Student's interval. One alone can tell nothing."""
        values = list(values)
        mean, spread = results.summary(values)
        return cls(mean, spread if len(values) > 1 else None, results.half_width(values))

    @classmethod
    def between(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gap | None:
        """``ours − theirs``, seed by seed; None where they share no seed."""
        shared = sorted(ours.keys() & theirs.keys())
        return cls.of(ours[seed] - theirs[seed] for seed in shared) if shared else None

    @classmethod
    def exact(cls, value: float) -> Gap:
        """Of something that has no spread, such as a count of bytes."""
        return cls(value, None, 0.0)


@dataclass(frozen=True)
class Claim:
    """That ``gap`` is below ``bound``; ``what`` says so in words, ``unit`` how numbers are written.

    The gap is None where the runs that it needs are not there.
    """

    what: str
    gap: Gap | None
    bound: float = 0.0
    unit: str = "{:+.3f}"

    @property
    def verdict(self) -> str:
        """Confirmed if the whole interval is below the bound, not if it is all above, else within the spread."""
        if self.gap is None:
            return MISSING
        if self.gap.mean + self.gap.half < self.bound:
            return CONFIRMED
        return NOT_CONFIRMED if self.gap.mean - self.gap.half >= self.bound else WITHIN

    def __str__(self) -> str:
        if self.gap is None:
            return f"{self.what} ({MISSING})"
        number = self.unit.format(self.gap.mean)
        if self.gap.spread is not None:
            number += " ± " + self.unit.replace("+", "").format(self.gap.spread)
        elif self.gap.half:
            number += ", one seed, which has no spread"
        return f"{self.what} ({number}: {self.verdict})"


def sentence(claims: Sequence[Claim]) -> str:
    """All claims in one sentence, which begins with what they amount to together."""
    verdicts = [claim.verdict for claim in claims]
    overall = next((v for v in (NOT_CONFIRMED, WITHIN, MISSING) if v in verdicts), CONFIRMED)
    if len(claims) > 1 and overall != CONFIRMED and CONFIRMED in verdicts:
        overall = f"confirmed in {verdicts.count(CONFIRMED)} of {len(claims)} parts"
    return f"{overall.capitalize()}: {'; '.join(map(str, claims))}."


def below(what: str, losses: Mapping[str, Mapping[int, float]], ours: str, theirs: str, bound: float = 0.0) -> Claim:
    """The claim that one setting's loss is below another's, seed by seed, or no more than ``bound`` above it."""
    return Claim(what, Gap.between(losses.get(ours, {}), losses.get(theirs, {})), bound)
