"""Which kernel stands in for a call of torch's attention: a file for each of them beside this one."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from prac.ops.attention.call import Backend, Call
from prac.ops.attention.flash import FLASH
from prac.ops.attention.flash_cpu import FLASH_CPU
from prac.runtime.autocast import autocast_dtype
from prac.runtime.fake import is_fake

BACKENDS = (FLASH_CPU, FLASH)
_NAMES = {0: "plain", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}


def choose(call: Call) -> Backend | str:
    """The kernel for a call, the one that torch would take; or why there is none among ours."""
    q, k, v, mask = call[:4]
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions, not 4"
    if mask is not None and mask.requires_grad:
        return "its mask (a bias of positions) needs a gradient"
    of_device = [backend for backend in BACKENDS if backend.device == q.device.type]
    if not of_device:
        return f"there is no kernel for it on {q.device.type}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"heads of q, k and v differ in size ({q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]})"
    reasons = {backend: backend.why_not(call) for backend in of_device}
    able = [backend for backend, why in reasons.items() if not why]
    if not able:
        return next(iter(reasons.values()))
    chosen = _torchs_choice(call)
    because = f" with dropout of {call.dropout}" if call.dropout and q.device.type == "cpu" else ""
    ours = " and ".join(dict.fromkeys(backend.name for backend in able))
    return next(
        (backend for backend in able if backend.number == chosen),
        f"torch runs it{because} by its {_NAMES.get(chosen, 'another')} kernel, and prac stands in for {ours} alone",
    )


def _torchs_choice(call: Call) -> int:
    """The number of the kernel that torch would run."""
    dtype = autocast_dtype(call.q)
    if is_fake(call.q):  # torch decides by device, dtypes and the size of a head
        with unset_fake_temporarily():
            q, k, v = (torch.empty(1, 1, 2, call.q.shape[-1], dtype=dtype, device="cpu") for _ in range(3))
            mask = None
            if call.mask is not None:
                kind = dtype if call.mask.dtype == torch.bool else call.mask.dtype
                mask = torch.zeros(1, 1, 2, 2, dtype=kind, device="cpu")
            return int(torch.ops.aten._fused_sdp_choice(q, k, v, mask, call.dropout, call.causal))
    q, k, v, mask, *_ = call._replace(q=call.q.detach(), k=call.k.detach(), v=call.v.detach()).for_kernels(dtype)
    return int(torch.ops.aten._fused_sdp_choice(q, k, v, mask, call.dropout, call.causal))
