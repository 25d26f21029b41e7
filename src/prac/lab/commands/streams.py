"""Terminals that know no more than ASCII: what cannot be shown there is spelled otherwise, and is no error."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper

SPELLED = {
    "–": "-", "—": "-", "−": "-", "×": "x", "·": ".", "±": "+-", "…": "...", "≤": "<=", "≥": ">=", "≈": "~", "→": "->",
    "‖": "|", "σ": "sigma", "²": "^2", "ᵀ": "^T", "“": '"', "”": '"', "’": "'", "█": "#", "━": "-", "─": "-",
}  # fmt: skip


def never_fail() -> None:
    """Let standard output and error spell what their encoding does not have."""
    codecs.register_error("prac", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="prac")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    # To what is no character at all, such as a file's name in bytes, "?" is all that can be said.
    return "".join(SPELLED.get(letter, "?") for letter in missing), error.end
