"""Scaled dot-product attention that keeps q, k, v and its output in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prac.estimators.base import Estimator, Kept
from prac.ops.attention.backends import choose
from prac.ops.attention.call import Backend, Call
from prac.ops.function import Gradients, apply, backward, save, saved
from prac.runtime.autocast import autocast_dtype, without_autocast


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
    backend: Backend | None = None,
) -> tuple[Tensor, Kept]:
    """``softmax(q kᵀ · scale + mask) v``, by a kernel that :func:`choose` finds; keeps q, k, v and the output.

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
        backend: the kernel, where it was chosen already.

    Returns:
        The output (B, H, S, D), in memory as (B, S, H, D), and what is kept of it as (B·S, H·D).

    Raises:
        ValueError: where there is no such kernel, with the reason.
    """
    chosen = backend or choose(Call(q, k, v, mask, dropout, causal, scale, gqa))
    if isinstance(chosen, str):
        raise ValueError(f"attention in few bits: {chosen}.")
    kept: list[Kept] = []
    out = apply(_Attention, q, k, v, mask, (dropout, causal, scale, gqa), chosen, keep, kept)
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
        backend: Backend,
        keep: Mapping[str, Estimator],
        kept_out: list[Kept],
    ) -> Tensor:
        ctx.dtypes, dtype = (q.dtype, k.dtype, v.dtype), autocast_dtype(q)
        with without_autocast(q.device.type):
            call = Call(q.to(dtype), k.to(dtype), v.to(dtype), mask, *setting)
            out, _, state, ctx.numbers = backend.forward(call.for_kernels(dtype))
            tensors = {"q": call.q, "k": call.k, "v": call.v, "out": out}
            kept = {name: keep[name].keep(_rows(t)) for name, t in tensors.items()}
        save(ctx, mask=(mask,), state=state, **{name: each.tensors for name, each in kept.items()})
        ctx.forms, ctx.setting, ctx.backend = {name: each.form for name, each in kept.items()}, setting, backend
        ctx.shapes = {name: t.shape for name, t in tensors.items()}
        kept_out.append(kept["out"])
        return out

    @backward
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        tensors = saved(ctx)

        def again(name: str) -> Tensor:
            return _heads(ctx.forms[name].reconstruct(tensors[name]), ctx.shapes[name])

        q, k, v = again("q"), again("k"), again("v")
        call = Call(q, k, v, tensors["mask"][0], *ctx.setting).for_kernels(q.dtype)
        result = ctx.backend.forward(call._replace(dropout=0.0))
        if call.dropout:  # which the log-sum-exp knows nothing of
            result = result._replace(out=again("out"))
        if result.tensors:  # which random numbers the forward pass drew
            result = result._replace(tensors=tensors["state"], numbers=ctx.numbers)
        dq, dk, dv = ctx.backend.backward(dout, call, result)
        if call.k.shape != k.shape:
            dk, dv = (d.unflatten(1, (t.shape[1], -1)).sum(2) for d, t in ((dk, k), (dv, v)))
        grads = (d.to(dtype) for d, dtype in zip((dq, dk, dv), ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, H, S, D) as (B·S, H·D), which is how it lies in memory as a rule."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def _heads(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_rows`."""
    b, h, s, d = shape
    return x.view(b, s, h, d).transpose(1, 2)
