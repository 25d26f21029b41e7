"""torch's flash attention on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from prac.ops.attention.call import Backend, Call, Result

aten = torch.ops.aten


def _why_not(call: Call) -> str:
    if call.mask is not None:
        return "torch's flash kernel takes no mask"
    if call.q.shape[-1] % 8:
        return f"heads of {call.q.shape[-1]} features, not a multiple of 8"
    return ""


def _forward(call: Call) -> Result:
    out, lse, seq_q, seq_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, call.dropout, call.causal, scale=call.scale
    )
    return Result(out, lse, (seq_q, seq_k, seed, offset), (max_q, max_k))


def _backward(dout: Tensor, call: Call, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    seq_q, seq_k, seed, offset = result.tensors
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout, call.q, call.k, call.v, result.out, result.lse, seq_q, seq_k, *result.numbers, call.dropout, call.causal,
        seed, offset, scale=call.scale,
    )  # fmt: skip
    return dq, dk, dv


FLASH = Backend("flash", torch.nn.attention.SDPBackend.FLASH_ATTENTION.value, "cuda", _why_not, _forward, _backward)
