"""Scaled dot-product attention that keeps q, k, v and its output in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from prac.config import Bits
from prac.estimators.base import Estimator, Kept
from prac.ops.function import Gradients, apply, backward, save, saved
from prac.runtime.autocast import autocast_dtype, without_autocast
from prac.runtime.fake import is_fake

aten = torch.ops.aten
FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, gqa: bool
) -> str:  # fmt: skip
    """Why this op cannot stand in for this call of torch's attention; "" where it can.

    It can where torch would take its flash kernel, whose backward the op calls.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions, not 4"
    if mask is not None and mask.requires_grad:
        return "its mask (a bias of positions) needs a gradient"
    if q.device.type not in ("cpu", "cuda"):
        return f"there is no kernel for it on {q.device.type}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"heads of q, k and v differ in size ({q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]})"
    if q.device.type == "cuda" and mask is not None:
        return "torch's flash kernel takes no mask"
    if q.device.type == "cuda" and q.shape[-1] % 8:
        return f"heads of {q.shape[-1]} features, not a multiple of 8"
    dtype = autocast_dtype(q)
    mask = _added(mask, dtype)
    if is_fake(q):  # torch decides by device, dtypes and the size of a head
        with unset_fake_temporarily():
            q, k, v = (torch.empty(1, 1, 2, q.shape[-1], dtype=dtype, device="cpu") for _ in range(3))
            mask = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask.dtype, device="cpu")
            chosen = aten._fused_sdp_choice(q, k, v, mask, dropout, causal)
    else:
        q, k, v = (t.detach().to(dtype) for t in (q, k, v))
        chosen = aten._fused_sdp_choice(q, *_repeated(q, k, v, gqa), mask, dropout, causal)
    if chosen == FLASH:
        return ""
    kernel = {0: "plain", 2: "memory-efficient", 3: "cuDNN"}.get(chosen, "another")
    because = f" with dropout of {dropout}" if dropout and q.device.type == "cpu" else ""
    return f"torch runs it{because} by its {kernel} kernel, and prac stands in for flash alone"


# The relative error (r.m.s.) of rounding to the nearest of so many bits, as prac.estimators.codes has it.
_ERROR = {4: 0.09, 8: 0.005}
# How far rounding may move a score. At 0.13, which unit-sized q and k have in 4 bits, gradients are off by a sixth.
_TOLERANCE = 0.2


def enough(q: Tensor, k: Tensor, scale: float | None, bits: int) -> Bits | None:
    """The bits to keep q and k in so that softmax is not lost in their rounding: ``bits``, or 8, or None for all.

    Rounding with a relative error of e moves a score ``q·k · scale`` by about ``√2 e √D · scale`` times the sizes
    (r.m.s.) of q and k. Where scores are not scaled, or training has made them large, 4 bits move them by more than
    softmax can bear.
    """
    if bits not in _ERROR:
        return Bits(bits)
    d = q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    squares = [torch.linalg.vector_norm(t.detach(), dtype=wide).square() / max(1, t.numel()) for t in (q, k)]
    size = (squares[0] * squares[1]).sqrt().item() * (2 * d) ** 0.5 * (d**-0.5 if scale is None else abs(scale))
    return next((Bits(b) for b in sorted({bits, 8}) if b >= bits and size * _ERROR[b] <= _TOLERANCE), None)


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
    """``softmax(q kᵀ · scale + mask) v``, where there is no reason :func:`why_not`; keeps q, k, v and the output.

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
        with without_autocast(q.device.type):
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            out, _, state, ctx.extra = _flash(q, *_repeated(q, k, v, gqa), _added(mask, dtype), dropout, causal, scale)
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
        mask = _added(tensors["mask"][0], q.dtype)
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


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the scores, as kernels want it. One of booleans is made so at each use.

    What is kept is then the mask that all layers share.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


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
