"""What the memory of a training step consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prac.memory.kinds import KEPT_KINDS, OTHER_KINDS
from prac.runtime.text import size


@dataclass(frozen=True)
class Breakdown:
    """Bytes of one training step at its highest point.

    ``peak`` counts everything: parameters, gradients, optimizer state, the batch, activations and temporaries.
    ``at_peak`` splits it by kind (:mod:`prac.memory.kinds`). ``kept`` is what autograd holds when the forward pass
    is over, by kind, and ``by_module`` the same by module. ``where`` says what was running at the peak.
    """

    peak: int
    where: str
    at_peak: dict[str, int]
    kept: dict[str, int]
    by_module: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def activations(self) -> int:
        """Bytes kept for backward."""
        return sum(self.kept.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the modules."""
        return {
            "peak_bytes": self.peak,
            "activation_bytes": self.activations,
            "where": self.where,
            "at_peak": ordered(self.at_peak),
            "kept": ordered(self.kept),
        }

    def __str__(self) -> str:
        width = max(map(len, (*self.at_peak, *self.kept)), default=0)
        lines = [f"peak {size(self.peak)}, in {self.where}"]
        for kind in ordered(self.at_peak | self.kept):
            at, kept = self.at_peak.get(kind, 0), self.kept.get(kind)
            note = "" if kept is None else f"   kept for backward: {size(kept)}"
            lines.append(f"  {kind:{width}}  {size(at):>10}{note}")
        return "\n".join(lines)


def ordered(kinds: Mapping[str, int]) -> dict[str, int]:
    """The same in the order of the tables."""
    return {kind: kinds[kind] for kind in (*OTHER_KINDS, *KEPT_KINDS) if kind in kinds}
