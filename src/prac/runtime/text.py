"""Text for terminals: sizes, columns, signs that standard output can print."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def printable(text: str) -> str:
    """``text`` in signs that standard output can print, whatever its locale."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for sign, plain in (("─", "-"), ("→", "->"), ("×", "x"), ("x̂", "xhat"), ("…", "..."), ("–", "-")):
        try:
            sign.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(sign, plain)
    return text.encode(encoding, "replace").decode(encoding)


def aligned(lines: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines of cells in columns, the first underlined; the columns ``right`` are aligned there."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [
        [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    cells.insert(1, ["─" * w for w in widths])
    return ["  ".join(line).rstrip() for line in cells]
