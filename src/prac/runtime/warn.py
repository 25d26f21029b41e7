"""Warnings that point at the caller's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

_INSIDE = tuple(f"{Path(path).parent}/" for path in (Path(__file__).parent, torch.__file__))


def warn(text: str) -> None:
    """Warn, of the nearest line outside prac and torch: where prac was called, or the layer in a model's code."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
