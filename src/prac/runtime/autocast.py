"""What autocast would do, on devices that have one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would run a matrix product on ``x``."""
    # Autocast leaves float64 alone, and the meta device has none.
    found = autocast_of(x.device.type) if x.dtype != torch.float64 else None
    return x.dtype if found is None else found


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; None where it is off."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, autocast is off, on devices that have one."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
