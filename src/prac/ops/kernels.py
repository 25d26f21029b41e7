"""What the ops do element by element, each in one pass over memory.

Token-sized tensors come as (M, n) and leave so; ``bits`` and ``noise`` are what
:mod:`prac.estimators.codes` takes. Statistics are in float32, or float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prac.config import Bits
from prac.estimators.codes import Dither, Tensors, load, store
from prac.ops.elementwise import ACTIVATIONS
from prac.runtime.kernel import fused


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@fused
def normalise(
    x_MN: Tensor,
    weight_N: Tensor | None,
    bias_N: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    bits: Bits | None,
    noise: Dither | None,
) -> tuple[Tensor, Tensor, Tensors]:
    """``y = γ x̂ + β`` in ``dtype``, the inverse deviation ρ (M, 1), and x̂ stored in ``bits``."""
    x_MN = x_MN.to(_wide(x_MN.dtype))
    if centered:
        x_MN = x_MN - x_MN.mean(-1, keepdim=True)
    rho_M1 = torch.rsqrt(x_MN.square().mean(-1, keepdim=True) + eps)
    xhat_MN = x_MN * rho_M1
    return _affine(xhat_MN, weight_N, bias_N).to(dtype), rho_M1, store(xhat_MN, bits, noise)


def _affine(xhat_MN: Tensor, weight_N: Tensor | None, bias_N: Tensor | None) -> Tensor:
    y_MN = xhat_MN if weight_N is None else xhat_MN * weight_N
    return y_MN if bias_N is None else y_MN + bias_N


@fused
def read_normalised(
    codes: Tensor, rest: Tensors, bits: Bits, n: int, weight_N: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``γ x̃ + β`` in ``dtype`` from the stored x̂."""
    return _affine(load(codes, rest, bits, n, _wide(dtype)), weight_N, bias_N).to(dtype)


@fused
def norm_input_grad(
    g_MN: Tensor,
    rho_M1: Tensor,
    stored: Tensors,
    bits: Bits | None,
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
    xhat_MN = load(stored[0], stored[1:], bits, n, rho_M1.dtype)
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
def norm_weight_grad(g_MN: Tensor, stored: Tensors, bits: Bits | None) -> Tensor:
    """``dγ = Σ g x̃`` over the tokens, (n,)."""
    wide = _wide(g_MN.dtype)
    return (g_MN.to(wide) * load(stored[0], stored[1:], bits, g_MN.shape[1], wide)).sum(0)


@fused
def inner(dz_MO: Tensor, z_MO: Tensor, bias_O: Tensor | None) -> Tensor:
    """``⟨dz, z − b⟩`` of each token, (M, 1)."""
    z_MO = z_MO if bias_O is None else z_MO - bias_O
    return (dz_MO * z_MO).sum(-1, keepdim=True, dtype=_wide(dz_MO.dtype))


@fused
def gated(g_MK: Tensor, u_MK: Tensor, function: str, bits: Bits | None) -> tuple[Tensor, Tensors, Tensors]:
    """``h = f(g) u``, with g and u stored in ``bits``."""
    return ACTIVATIONS[function].forward(g_MK) * u_MK, store(g_MK, bits), store(u_MK, bits)


@fused
def gated_backward(
    dh_MK: Tensor, g: Tensors, u: Tensors, bits: Bits | None, function: str, scalar: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``h``, ``dg``, ``du`` in the dtype of ``dh``, and ``⟨dg, g⟩ + ⟨du, u⟩`` of each token if asked for, (M, 1)."""
    f, k, dtype = ACTIVATIONS[function], dh_MK.shape[1], dh_MK.dtype
    dh_MK, g_MK, u_MK = (
        dh_MK.to(_wide(dtype)),
        load(g[0], g[1:], bits, k, _wide(dtype)),
        load(u[0], u[1:], bits, k, _wide(dtype)),
    )
    f_MK = f.forward(g_MK)
    dg_MK, du_MK = f.backward(dh_MK * u_MK, g_MK), dh_MK * f_MK
    s_M1 = (dg_MK * g_MK + du_MK * u_MK).sum(-1, keepdim=True) if scalar else None
    return (f_MK * u_MK).to(dtype), dg_MK.to(dtype), du_MK.to(dtype), s_M1


@fused
def activated(a_MK: Tensor, function: str, bits: Bits | None) -> tuple[Tensor, Tensors]:
    """``h = f(a)``, with a stored in ``bits``."""
    return ACTIVATIONS[function].forward(a_MK), store(a_MK, bits)


@fused
def activated_backward(
    dh_MK: Tensor, a: Tensors, bits: Bits | None, function: str, scalar: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``h`` and ``da`` in the dtype of ``dh``, and ``⟨da, a⟩`` of each token if asked for, (M, 1)."""
    f, k, dtype = ACTIVATIONS[function], dh_MK.shape[1], dh_MK.dtype
    dh_MK, a_MK = dh_MK.to(_wide(dtype)), load(a[0], a[1:], bits, k, _wide(dtype))
    da_MK = f.backward(dh_MK, a_MK)
    s_M1 = (da_MK * a_MK).sum(-1, keepdim=True) if scalar else None
    return f.forward(a_MK).to(dtype), da_MK.to(dtype), s_M1
