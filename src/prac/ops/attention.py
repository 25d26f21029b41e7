"""Scaled dot-product attention that keeps q, k, v and its output in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from prac.estimator import Estimator, Kept
from prac.ops.function import Gradients, apply, autocast_dtype, backward, save, saved
from prac.tangible import is_hollow

aten = torch.ops.aten
FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


def runs_here(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, gqa: bool) -> bool:
    """Whether torch would run this attention by its flash kernel, whose backward this op calls."""
    if mask is not None and mask.requires_grad:
        return False
    if q.device.type not in ("cpu", "cuda") or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    if q.device.type == "cuda" and (mask is not None or q.shape[-1] % 8):
        return False
    dtype = autocast_dtype(q)
    if is_hollow(q):  # torch decides by device, dtypes and the size of a head
        with unset_fake_temporarily():
            q, k, v = (torch.empty(1, 1, 2, q.shape[-1], dtype=dtype) for _ in range(3))
            mask = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask.dtype)
            return bool(aten._fused_sdp_choice(q, k, v, mask, dropout, causal) == FLASH)
    q, k, v = (t.detach().to(dtype) for t in (q, k, v))
    return bool(aten._fused_sdp_choice(q, *_repeated(q, k, v, gqa), mask, dropout, causal) == FLASH)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Mapping[str, Estimator],
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
) -> tuple[Tensor, Kept]:
    """``softmax(q kᵀ · scale + mask) v``, where :func:`runs_here` says so; keeps q, k, v and the output.

    The output is exact. Backward does attention once more for the rounded q, k and v, so the gradients are exact ones,
    of a point nearby: probabilities of each row add up to 1 whatever the rounding. (With the exact log-sum-exp of the
    forward pass they would not, and where scores are large an error in them is an exponent.) With 8 bits that moves the
    gradients by about 1%, with 4 by about a sixth (for Gaussian inputs; the tests bound both). v enters linearly and is
    rounded without bias, and so is the output, for those who read it.

    Args:
        q: (B, H, S, D).
        k: (B, H', S', D), where H' divides H.
        v: (B, H', S', D).
        keep: estimators of ``q``, ``k``, ``v`` and ``out``, each asked for (B·S, H·D).
        mask: as for ``F.scaled_dot_product_attention``, like the rest.
        dropout: probability; on CUDA alone.
        causal: whether a token sees those before it alone.
        scale: of the scores; 1/√D by default.
        gqa: whether k and v have fewer heads.

    Returns:
        The output (B, H, S, D), in memory as (B, S, H, D), and what is kept of it as (B·S, H·D).
    """
    kept: list[Kept] = []
    out = apply(_Attention, q, k, v, mask, (dropout, causal, scale, gqa), keep, kept)
    return out, kept[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        setting: tuple[float, bool, float | None, bool],
        keep: Mapping[str, Estimator],
        kept_out: list[Kept],
    ) -> Tensor:
        dropout, causal, scale, gqa = setting
        ctx.dtypes, dtype = (q.dtype, k.dtype, v.dtype), autocast_dtype(q)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            out, _, state, ctx.extra = _flash(q, *_repeated(q, k, v, gqa), mask, dropout, causal, scale)
            kept = {name: keep[name].keep(_rows(t)) for name, t in (("q", q), ("k", k), ("v", v), ("out", out))}
        save(ctx, mask=(mask,), state=state, **{name: each.tensors for name, each in kept.items()})
        ctx.forms, ctx.setting = {name: each.form for name, each in kept.items()}, setting
        ctx.shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "out": out.shape}
        kept_out.append(kept["out"])
        return out

    @backward
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        tensors = saved(ctx)
        dropout, causal, scale, gqa = ctx.setting
        q, k, v = (_heads(Kept(tensors[t], ctx.forms[t]).reconstruct(), ctx.shapes[t]) for t in ("q", "k", "v"))
        (mask,) = tensors["mask"]
        full = (q, *_repeated(q, k, v, gqa))
        out, lse, *_ = _flash(*full, mask, 0.0, causal, scale)
        if dropout:  # which the log-sum-exp knows nothing of
            out = _heads(Kept(tensors["out"], ctx.forms["out"]).reconstruct(), ctx.shapes["out"])
        if ctx.extra is None:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, *full, out, lse, dropout, causal, attn_mask=mask, scale=scale
            )
        else:
            seq_q, seq_k, seed, offset = tensors["state"]
            grads = aten._scaled_dot_product_flash_attention_backward(
                dout, *full, out, lse, seq_q, seq_k, *ctx.extra, dropout, causal, seed, offset, scale=scale
            )
        dq, dk, dv = grads
        if gqa:
            dk, dv = (d.unflatten(1, (t.shape[1], -1)).sum(2) for d, t in ((dk, k), (dv, v)))
        return *(d.to(dtype) for d, dtype in zip((dq, dk, dv), ctx.dtypes, strict=True)), None, None, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[int, int] | None]:
    """The output, the log-sum-exp of each row of scores, and what else the kernel's backward asks for."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout, causal, attn_mask=mask, scale=scale
        )
        return out, lse, (), None
    out, lse, seq_q, seq_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, dropout, causal, scale=scale
    )
    return out, lse, (seq_q, seq_k, seed, offset), (max_q, max_k)


def _repeated(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> tuple[Tensor, Tensor]:
    """K and v with as many heads as q."""
    if not gqa or q.shape[1] == k.shape[1]:
        return k, v
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


def _rows(x: Tensor) -> Tensor:
    """(B, H, S, D) as (B·S, H·D), which is how it lies in memory as a rule."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def _heads(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_rows`."""
    b, h, s, d = shape
    return x.view(b, s, h, d).transpose(1, 2)
