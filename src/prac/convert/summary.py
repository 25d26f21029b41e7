"""The table behind ``handle.summary()``: every module, matched or skipped and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from prac.runtime.text import aligned, printable


@dataclass(frozen=True)
class Row:
    """One module.

    ``before`` and ``after`` are bytes per row (token) that the layer's own formula keeps for
    backward: its input, or Z, and statistics. Inputs shared with an earlier layer count there.
    None where they are not this library's to know. What is called ``calls`` times in a pass keeps them each time.
    """

    name: str
    module: str
    what: str  # linear, norm, activation or "-"
    rank: str
    before: int | None
    after: int | None
    note: str
    calls: int = 1

    @property
    def compressed(self) -> bool:
        """Whether the layer's input is kept compressed."""
        return self.rank not in ("", "in full")


def table(rows: Sequence[Row], remarks: Iterable[str] = ()) -> str:
    """The rows as text; blocks that repeat are folded into one line with a count. Under them the remarks and totals."""
    lines = [("layer", "module", "kind", "rank", "before", "after", "note")]
    for pattern, note, count, row in _fold(rows):
        name = pattern if count == 1 else f"{pattern} ×{count}"
        if row.calls > 1:
            note = "; ".join(filter(None, [note, f"called {row.calls} times in a pass, and keeps so much each time"]))
        lines.append((name, row.module, row.what, row.rank, _number(row.before), _number(row.after), note))
    text = aligned(lines, right={4, 5})
    compressed = [row for row in rows if row.compressed]
    counted = [row for row in rows if row.rank]
    before, after = (sum((getattr(row, side) or 0) * row.calls for row in counted) for side in ("before", "after"))
    text += ["", *remarks]
    text.append(
        f"{len(compressed)} layers compressed, {len(rows) - len(compressed)} modules left alone. "
        f"Bytes per token kept by layers: {before:,} → {after:,}" + (f" ({after / before:.0%})." if before else ".")
    )
    sums = "residual sums, products"
    if not any(row.what == "attention" for row in compressed):
        sums = f"attention's q, k, v and output, {sums}"
    text.append(f"What is computed between modules ({sums}) stays in full.")
    return printable("\n".join(text))


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _fold(rows: Iterable[Row]) -> list[tuple[str, str, int, Row]]:
    """Rows that differ in the numbers within their names alone, as (pattern, pattern of the notes, count, first)."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        generic = tuple(_NUMBERS.sub("#", text) for text in (row.name, row.note))
        alike = (*generic, row.module, row.what, row.rank, _number(row.after), str(row.calls))
        groups.setdefault(alike, []).append(row)
    return [
        (_pattern([row.name for row in group]), _pattern([row.note for row in group]), len(group), group[0])
        for group in groups.values()
    ]


_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def _pattern(names: Sequence[str]) -> str:
    """``layers.[0-3].q_proj`` for names that differ in their numbers."""
    columns = zip(*(_NUMBERS.findall(name) for name in names), strict=True)
    ranges = [min(c, key=int) if len(set(c)) == 1 else f"[{min(c, key=int)}-{max(c, key=int)}]" for c in columns]
    pieces = _NUMBERS.split(names[0])
    return "".join(piece + number for piece, number in zip(pieces, [*ranges, ""], strict=True))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module does work of its own."""
    empty = isinstance(module, nn.Identity | nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.Sequential)
    return (not any(module.children()) and not empty) or any(True for _ in module.parameters(recurse=False))


def why_left(module: nn.Module) -> str:
    """Why a module that is not known stays as it is."""
    if isinstance(module, nn.Embedding):
        return "embedding: keeps token ids only"
    if isinstance(module, nn.Dropout | nn.modules.dropout._DropoutNd):
        return "dropout: keeps a mask, where p > 0"
    if isinstance(module, nn.MultiheadAttention):
        return "its input projection runs inside a function, out of reach; its input stays in full"
    if not any(True for _ in module.parameters(recurse=False)):
        return "no parameters of its own"
    return "not a kind that prac compresses; what it keeps stays in full"
