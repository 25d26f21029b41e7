"""torch's flash attention on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from prac.ops.attention.call import Backend, Call, Result

aten = torch.ops.aten


def _forward(call: Call) -> Result:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, call.dropout, call.causal, attn_mask=call.mask, scale=call.scale
    )
    return Result(out, lse)


def _backward(dout: Tensor, call: Call, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, call.q, call.k, call.v, result.out, result.lse, call.dropout, call.causal, attn_mask=call.mask,
        scale=call.scale,
    )  # fmt: skip
    return dq, dk, dv


FLASH_CPU = Backend(
    "flash", torch.nn.attention.SDPBackend.FLASH_ATTENTION.value, "cpu", lambda call: "", _forward, _backward
)
