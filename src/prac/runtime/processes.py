"""The processes that train together."""

from __future__ import annotations

import torch


def process() -> int:
    """The number of this one among them."""
    return torch.distributed.get_rank() if among_several() else 0


def among_several() -> bool:
    """Whether there are others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
