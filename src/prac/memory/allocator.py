"""What torch's own allocator hands out while a block runs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_MARK = "prac: mark"


@dataclass
class Allocated:
    """Bytes above what was there before the block: at its highest point, and when ``mark`` was called."""

    device: torch.device
    peak: int = 0
    marked: int = 0
    _before: int = 0

    def mark(self) -> None:
        """Note how much there is now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.marked = torch.cuda.memory_allocated(self.device) - self._before
        else:
            with torch.profiler.record_function(_MARK):
                pass


@contextmanager
def allocated(device: torch.device) -> Iterator[Allocated]:
    """Watch the allocator of ``device`` while the block runs; what is yielded is filled in at its end.

    This includes compiled code and tensors made inside operators, but not what a library takes from the system by
    itself (oneDNN's scratch space, say), nor, on CUDA, what the allocator holds in reserve.
    """
    found = Allocated(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found._before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device) - found._before
        return
    # At any lower level the profiler says on stderr that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "7")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # One cycle alone: without acc_events torch 2.11 warns that others would be dropped.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        yield found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    marks = [event["ts"] for event in events if event.get("name") == _MARK]
    now = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        now += event["args"]["Bytes"]  # negative where freed
        found.peak = max(found.peak, now)
        if marks and event["ts"] <= marks[0]:
            found.marked = now
