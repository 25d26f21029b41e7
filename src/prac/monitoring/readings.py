"""The numbers of one measured step: a row for each layer, as a table, as scalars to log, as plain data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from prac.runtime.text import aligned


@dataclass(frozen=True)
class LayerStats:
    """One layer in one step.

    Attributes:
        name: of the module.
        kind: linear, norm, activation or attention; ``-`` for a layer that is not compressed.
        rank: how its input is kept, as in ``handle.summary()``.
        kept_bytes: what it kept for backward; what several layers read counts for the first.
        refreshes: of its subspaces so far.
        reconstruction_error: ‖X̃ − X‖² / ‖X‖² of the tensors that it reads from what is kept (for a norm, x̂). None
            where it reads nothing that is compressed.
        gradient_variance: ‖G̃ − G‖² / ‖G‖² of the gradients of its own parameters, where G is exact: one draw of the
            relative variance where gradients are unbiased, and its bias as well where they are not. Noise that comes
            down from the layers above is part of it. None where no parameter is trained. In a gradient's own
            precision: for bfloat16, what is below some 1e-5 is rounding.
    """

    name: str
    kind: str
    rank: str
    kept_bytes: int
    refreshes: int
    reconstruction_error: float | None
    gradient_variance: float | None


@dataclass(frozen=True)
class Reading:
    """All layers in one step; ``str`` gives a table, those that lose most first.

    Attributes:
        step: the optimizer step, counted from 1.
        kept_bytes: what the whole model kept for backward of the batch, everything included.
        refreshes: of all subspaces so far.
        layers: in the model's order.
    """

    step: int
    kept_bytes: int
    refreshes: int
    layers: tuple[LayerStats, ...]

    def totals(self) -> dict[str, float]:
        """Kept bytes, refreshes, and the mean errors over layers, by name."""
        means = {f"prac/{name}": _mean(self, name) for name in ("reconstruction_error", "gradient_variance")}
        counts = {"prac/kept_bytes": float(self.kept_bytes), "prac/refreshes": float(self.refreshes)}
        return counts | {name: value for name, value in means.items() if value is not None}

    def scalars(self) -> dict[str, float]:
        """Everything, by name, for a logger: ``prac/gradient_variance/model.layers.0.mlp.up_proj``."""
        found = self.totals()
        for layer in self.layers:
            of = dataclasses.asdict(layer)
            if layer.kind == "-":
                of = {"gradient_variance": layer.gradient_variance}
            for name in ("kept_bytes", "refreshes", "reconstruction_error", "gradient_variance"):
                if of.get(name) is not None:
                    found[f"prac/{name}/{layer.name}"] = float(of[name])
        return found

    def worst(self) -> list[LayerStats]:
        """The layers, those that lose most first: by the variance of their gradients, then by reconstruction."""

        def loss(layer: LayerStats) -> tuple[float, float]:
            return (_number(layer.gradient_variance), _number(layer.reconstruction_error))

        return sorted(self.layers, key=loss, reverse=True)

    def table(self, top: int | None = None) -> str:
        """The ``top`` layers that lose most, or all of them."""
        lines: list[tuple[str, ...]] = [("layer", "kind", "rank", "kept bytes", "refreshes", "of x̃", "of gradient")]
        shown = self.worst()[:top]
        for layer in shown:
            errors = (layer.reconstruction_error, layer.gradient_variance)
            counts = (f"{layer.kept_bytes:,}", f"{layer.refreshes:,}")
            lines.append((layer.name, layer.kind, layer.rank, *counts, *map(_percent, errors)))
        rest = len(self.layers) - len(shown)
        totals = self.totals()
        return "\n".join(
            [
                f"step {self.step:,}: squared relative error of what each layer reads, and of its gradients",
                *aligned(lines, right={3, 4, 5, 6}),
                "",
                f"{f'and {rest} layers more. ' if rest else ''}Kept for backward in all: {self.kept_bytes:,} bytes. "
                f"Mean over layers: {_percent(totals.get('prac/reconstruction_error'))} of x̃, "
                f"{_percent(totals.get('prac/gradient_variance'))} of gradients.",
            ]
        )

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reading:
        """The inverse."""
        return cls(
            data["step"], data["kept_bytes"], data["refreshes"], tuple(LayerStats(**layer) for layer in data["layers"])
        )


def _mean(reading: Reading, name: str) -> float | None:
    values = [value for layer in reading.layers if (value := getattr(layer, name)) is not None]
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None) -> float:
    """For sorting: what is not a number is worst, what is not there is best."""
    return -1.0 if value is None else math.inf if math.isnan(value) else value


def _percent(value: float | None) -> str:
    if value is None or 0 < value < 5e-5:
        return "–" if value is None else f"{value:.0e}"
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"
