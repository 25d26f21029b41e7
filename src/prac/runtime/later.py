"""Truth that is still being computed on a device: heard of when it is there, and waited for by nobody."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A boolean tensor of one element, asked for without waiting.

    Args:
        value: on a CUDA device it is copied to the host as soon as the device comes to it; elsewhere it is there.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type != "cuda":
            self._value = value
            return
        self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
        with torch.cuda.device(value.device):
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def heard(self) -> bool | None:
        """It, or None while it is not there yet."""
        if self._event is not None and not self._event.query():
            return None
        return bool(self._value.item())
