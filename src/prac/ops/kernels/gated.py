"""The hidden layer of an MLP, forward and back, each in one pass over memory; shapes as in :mod:`.norm`."""

from __future__ import annotations

from torch import Tensor

from prac.estimators.codes import Codes, Coding, Tensors, load, store
from prac.ops.elementwise import ACTIVATIONS
from prac.ops.kernels.norm import wide
from prac.runtime.kernel import fused


@fused
def gated(
    g_MK: Tensor, u_MK: Tensor, function: str, coding_g: Coding, coding_u: Coding
) -> tuple[Tensor, Tensors, Tensors]:
    """``h = f(g) u``, and g and u as they were written."""
    return ACTIVATIONS[function].forward(g_MK) * u_MK, store(g_MK, coding_g), store(u_MK, coding_u)


@fused
def gated_backward(
    dh_MK: Tensor, g: Codes, u: Codes, function: str, scalar: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``h``, ``dg``, ``du`` in the dtype of ``dh``, and ``⟨dg, g⟩ + ⟨du, u⟩`` of each token if asked for, (M, 1)."""
    f, dtype = ACTIVATIONS[function], dh_MK.dtype
    dh_MK, g_MK, u_MK = dh_MK.to(wide(dtype)), load(g, wide(dtype)), load(u, wide(dtype))
    f_MK = f.forward(g_MK)
    dg_MK, du_MK = f.backward(dh_MK * u_MK, g_MK), dh_MK * f_MK
    s_M1 = (dg_MK * g_MK + du_MK * u_MK).sum(-1, keepdim=True) if scalar else None
    return (f_MK * u_MK).to(dtype), dg_MK.to(dtype), du_MK.to(dtype), s_M1


@fused
def activated(a_MK: Tensor, function: str, coding: Coding) -> tuple[Tensor, Tensors]:
    """``h = f(a)``, and a as it was written."""
    return ACTIVATIONS[function].forward(a_MK), store(a_MK, coding)


@fused
def activated_backward(dh_MK: Tensor, a: Codes, function: str, scalar: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``h`` and ``da`` in the dtype of ``dh``, and ``⟨da, a⟩`` of each token if asked for, (M, 1)."""
    f, dtype = ACTIVATIONS[function], dh_MK.dtype
    dh_MK, a_MK = dh_MK.to(wide(dtype)), load(a, wide(dtype))
    da_MK = f.backward(dh_MK, a_MK)
    s_M1 = (da_MK * a_MK).sum(-1, keepdim=True) if scalar else None
    return f.forward(a_MK).to(dtype), da_MK.to(dtype), s_M1
