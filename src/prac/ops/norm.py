"""RMSNorm and LayerNorm, with compressed inputs and exact statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.estimators.base import Estimator
from prac.ops.function import Gradients, apply, backward
from prac.runtime.autocast import autocast_dtype


def rms_norm(
    x: Tensor,
    weight_N: Tensor | None,
    eps: float,
    estimator: Estimator,
    *,
    offset: float = 0.0,
    compute: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``(offset + γ) · x ρ`` with ``ρ = (mean(x²) + eps)^-½``; keeps a compressed x and exact ρ.

    With ``x̂ = x̃ ρ`` and ``g = dy``:  ``dx = ρ (γ g − x̂ mean(γ g x̂))``,  ``dγ = Σ g x̂``.
    The output is exact and dγ as unbiased as x̃; dx is quadratic in x̃ and so *biased*: its
    second term has relative error of the size of x̃'s own (Section 5.1 of the paper accepts it).

    x̃ is longer than x: by Theorem 7 its mean square is that of x and (k − 1) times the energy outside Q1 on top, so the
    term takes off several times what it should. Where ``estimator.renormalise``, the x̂ of dx has the mean square that
    the exact one has, 1 − eps ρ². Then dx is the gradient's part orthogonal to *some* direction, the estimated one.

    Args:
        x: (..., n).
        weight_N: γ, (n,), or None for 1.
        eps: added to the mean square.
        estimator: keeps ``x``.
        offset: added to γ; 1.0 for Gemma's norm.
        compute: how to compute the output, where another implementation's rounding is to be
            kept; by default ``F.rms_norm``.
    """
    if compute is None:
        gamma_N = weight_N if weight_N is None or not offset else weight_N.detach() + offset

        def compute(x: Tensor) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], gamma_N, eps)

    return apply(_Norm, x, weight_N, None, eps, estimator, compute, offset, False)


def layer_norm(
    x: Tensor,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    estimator: Estimator,
    *,
    compute: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``γ · (x − μ) ρ + β``; keeps a compressed x and the exact mean μ and inverse deviation ρ.

    With ``x̂ = (x̃ − μ) ρ``:  ``dx = ρ (γ g − mean(γ g) − x̂ mean(γ g x̂))``,  ``dγ = Σ g x̂``,
    ``dβ = Σ g``. Bias as for :func:`rms_norm`. Arguments likewise, ``bias_N`` being β.
    """
    if compute is None:

        def compute(x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight_N, bias_N, eps)

    return apply(_Norm, x, weight_N, bias_N, eps, estimator, compute, 0.0, True)


class _Norm(torch.autograd.Function):
    """Both norms: RMSNorm is LayerNorm with μ = 0 and no mean taken off the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_N: Tensor | None,
        bias_N: Tensor | None,
        eps: float,
        estimator: Estimator,
        compute: Callable[[Tensor], Tensor],
        offset: float,
        centered: bool,
    ) -> Tensor:
        n = x.shape[-1]
        x_MN = x.reshape(-1, n)
        kept, mu_M1, rho_M1 = None, None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            kept = estimator.keep(x, x.dtype if centered else _kept_in(x, estimator))
            # Statistics in float32 or wider, one pass and no copy of x.
            dtype = torch.promote_types(x.dtype, torch.float32)
            if centered:
                var_M1, mu_M1 = torch.var_mean(x_MN.to(dtype), dim=-1, correction=0, keepdim=True)
            else:
                norm_M1 = torch.linalg.vector_norm(x_MN, dim=-1, keepdim=True, dtype=dtype)
                var_M1 = norm_M1.square() / n
            rho_M1 = torch.rsqrt(var_M1 + eps)
        ctx.save_for_backward(
            weight_N if ctx.needs_input_grad[0] else None, mu_M1, rho_M1, *(kept.tensors if kept else ())
        )
        ctx.form = kept.form if kept else None
        ctx.offset, ctx.shape, ctx.eps = offset, x.shape, eps if estimator.renormalise else None
        ctx.dtypes = (x.dtype, *(None if t is None else t.dtype for t in (weight_N, bias_N)))
        return compute(x)

    @backward
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        weight_N, mu_M1, rho_M1, *tensors = ctx.saved_tensors
        dx = dw_N = db_N = None
        g_MN = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            db_N = g_MN.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias_dtype)
        if ctx.form is not None:
            g_MN = g_MN.to(rho_M1.dtype)
            x_MN = ctx.form.reconstruct(tuple(tensors)).to(rho_M1.dtype)
            xhat_MN = (x_MN if mu_M1 is None else x_MN - mu_M1) * rho_M1
            if ctx.needs_input_grad[1]:
                dw_N = (g_MN * xhat_MN).sum(0).to(weight_dtype)
            if ctx.needs_input_grad[0]:
                if ctx.eps is not None:
                    xhat_MN = _renormalised(xhat_MN, rho_M1, ctx.eps)
                if weight_N is not None:
                    g_MN = g_MN * (weight_N + ctx.offset if ctx.offset else weight_N)
                dx_MN = g_MN - xhat_MN * (g_MN * xhat_MN).mean(-1, keepdim=True)
                if mu_M1 is not None:
                    dx_MN = dx_MN - g_MN.mean(-1, keepdim=True)
                dx = (dx_MN * rho_M1).view(ctx.shape).to(x_dtype)
        return dx, dw_N, db_N, None, None, None, None, None


def _kept_in(x: Tensor, estimator: Estimator) -> torch.dtype:
    """Of a projection, autocast's dtype where that has the range of float32, as for other products; else that of x.

    For RMSNorm: LayerNorm takes the mean off, and where it is large what is left would be the rounding.
    """
    dtype = x.dtype if estimator.complete else autocast_dtype(x)
    return dtype if torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max else x.dtype


def _renormalised(xhat_MN: Tensor, rho_M1: Tensor, eps: float) -> Tensor:
    """x̂ with the mean square of the exact one, 1 − eps ρ², whose estimate it is."""
    length_M1 = torch.linalg.vector_norm(xhat_MN, dim=-1, keepdim=True) / xhat_MN.shape[-1] ** 0.5
    exact_M1 = (1 - eps * rho_M1.square()).clamp_min(0).sqrt()
    return xhat_MN * (exact_M1 / length_M1.clamp_min(torch.finfo(xhat_MN.dtype).tiny))
