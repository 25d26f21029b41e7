"""Norms and what their readers bring back, each in one pass over memory.

Tensors of tokens come as (M, n) and leave so. Statistics are in float32, or float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prac.estimators.codes import Codes, Coding, Tensors, load, store
from prac.runtime.kernel import fused


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of this one are added up."""
    return torch.promote_types(dtype, torch.float32)


@fused
def normalise(
    x_MN: Tensor,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    coding: Coding,
) -> tuple[Tensor, Tensor, Tensors]:
    """``y = γ x̂ + β`` in ``dtype``, the inverse deviation ρ (M, 1), and x̂ as it was written."""
    x_MN = x_MN.to(wide(x_MN.dtype))
    if centered:
        x_MN = x_MN - x_MN.mean(-1, keepdim=True)
    rho_M1 = torch.rsqrt(x_MN.square().mean(-1, keepdim=True) + eps)
    xhat_MN = x_MN * rho_M1
    return _affine(xhat_MN, weight_N, bias_N).to(dtype), rho_M1, store(xhat_MN, coding)


def _affine(xhat_MN: Tensor, weight_N: Tensor | None, bias_N: Tensor | None) -> Tensor:
    y_MN = xhat_MN if weight_N is None else xhat_MN * weight_N
    return y_MN if bias_N is None else y_MN + bias_N


@fused
def read_normalised(xhat: Codes, weight_N: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``γ x̃ + β`` in ``dtype``."""
    return _affine(load(xhat, wide(dtype)), weight_N, bias_N).to(dtype)


@fused
def norm_input_grad(
    g_MN: Tensor,
    rho_M1: Tensor,
    xhat: Codes,
    weight_N: Tensor | None,
    exact: tuple[Tensor, Tensor] | None,
    centered: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``dx = ρ (γ g − x̃ c)``, less ``ρ mean(γ g)`` where ``centered``, for ``g = dL/dy``.

    ``exact`` is n c of each token, and whether it holds for it; elsewhere ``c = mean(γ g x̃)``.
    """
    n = g_MN.shape[1]
    g_MN = g_MN.to(rho_M1.dtype)
    xhat_MN = load(xhat, rho_M1.dtype)
    if weight_N is not None:
        g_MN = g_MN * weight_N
    c_M1 = (g_MN * xhat_MN).mean(-1, keepdim=True)
    if exact is not None:
        c_M1 = torch.where(exact[1], exact[0] / n, c_M1)
    dx_MN = g_MN - xhat_MN * c_M1
    if centered:
        dx_MN = dx_MN - g_MN.mean(-1, keepdim=True)
    return (dx_MN * rho_M1).to(dtype)


@fused
def norm_weight_grad(g_MN: Tensor, xhat: Codes) -> Tensor:
    """``dγ = Σ g x̃`` over the tokens, (n,)."""
    return (g_MN.to(wide(g_MN.dtype)) * load(xhat, wide(g_MN.dtype))).sum(0)


@fused
def inner(dz_MO: Tensor, z_MO: Tensor, bias_O: Tensor | None) -> Tensor:
    """``⟨dz, z − b⟩`` of each token, (M, 1)."""
    z_MO = z_MO if bias_O is None else z_MO - bias_O
    return (dz_MO * z_MO).sum(-1, keepdim=True, dtype=wide(dz_MO.dtype))
