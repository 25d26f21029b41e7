"""A norm whose x̂ is kept once, for its own backward and for every linear layer that reads its output.

    x̂ = (x − μ) ρ,      y = γ x̂ + β,      z_i = y W_iᵀ + b_i,      g = dL/dy = Σ dz_i W_i

    dL/dx = ρ (γ g − x̂ c  [− mean(γ g)]),      c = mean(γ g x̂) = (Σ_i ⟨dz_i, z_i − b_i⟩ − ⟨g, β⟩) / n

(μ and the last term are LayerNorm's). A noisy x̃ in place of x̂ is harmless in dL/dx except within
c, where it adds up along x̂. But c is one number per token, and it is known exactly from the outputs
of those that read y. With it dL/dx is linear in x̃: unbiased where x̃ is, with a noise of c (x̃ − x̂).

Both gradients are linear in g too, so readers need not know of each other: each adds the part of dL/dx
that goes through it. Those that run in one operation with the norm (:mod:`prac.ops.group`,
:mod:`prac.ops.mlp`) bring the exact c of their part; for anybody else who reads y, c comes from x̃. Where
x̃ is all of x̂ rounded with a relative error of e, that costs a relative error of about e / √n
in dL/dx, less than the rounding itself does, and the exact c is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prac.estimator import Estimator, Form, Kept, Tensors
from prac.ops import kernels
from prac.ops.function import Gradients, apply, backward, cast, save, saved
from prac.stored import Rounded, Stored


class Norm(NamedTuple):
    """What a norm does: ``(offset + γ) x̂ + β``, centered for LayerNorm."""

    eps: float
    offset: float
    centered: bool

    def scale(self, weight_N: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """``offset + γ``."""
        return None if weight_N is None else weight_N.detach().to(dtype) + self.offset


class Affine(NamedTuple):
    """The form of ``y = γ x̂ + β`` where x̂ is what is kept. Its last tensors are γ and β, those that there are."""

    xhat: Form
    norm: Norm
    weight: bool
    bias: bool
    dtype: torch.dtype

    def _split(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensor | None, Tensor | None]:
        count = len(tensors) - self.weight - self.bias
        weight_N = self.norm.scale(tensors[count], dtype) if self.weight else None
        return tensors[:count], weight_N, tensors[-1].to(dtype) if self.bias else None

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """``γ x̃ + β``, (M, n)."""
        kept, weight_N, bias_N = self._split(tensors, torch.promote_types(self.dtype, torch.float32))
        kept, bits = encoded(Kept(kept, self.xhat))
        n = self.xhat.n if isinstance(self.xhat, Rounded) else kept[0].shape[1]
        return kernels.read_normalised(kept[0], kept[1:], bits, n, weight_N, bias_N, self.dtype)

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """``dyᵀ (γ x̃ + β)``, (O, n)."""
        if isinstance(self.xhat, Rounded):
            return dy_MO.mT @ self.reconstruct(tensors).to(dy_MO.dtype)
        kept, weight_N, bias_N = self._split(tensors, dy_MO.dtype)
        dw_ON = self.xhat.weight_grad(dy_MO, kept)
        dw_ON = dw_ON if weight_N is None else dw_ON * weight_N
        return dw_ON if bias_N is None else dw_ON.addr_(dy_MO.sum(0), bias_N)


def encoded(kept: Kept) -> tuple[Tensors, Any]:
    """The kept tensor as :func:`prac.storage.store` leaves it: rounded ones as they are, others rebuilt."""
    if isinstance(kept.form, Rounded):
        return kept.tensors, kept.form.bits
    return (kept.reconstruct(),), None


@dataclass
class Normed:
    """A norm's output, for those that read it: where it came from and what is kept of it.

    Lives as long as the output does; holds the norm's input, through which gradients go.
    """

    norm: Norm
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rho_M1: Tensor
    xhat: Kept
    # Of the layers that read y in one operation: what they computed and have not yet handed out, by id.
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def kept(self, dtype: torch.dtype) -> Kept:
        """What is kept of y itself, to be read in ``dtype``."""
        affine = tuple(t for t in (self.weight, self.bias) if t is not None)
        form = Affine(self.xhat.form, self.norm, self.weight is not None, self.bias is not None, dtype)
        return Kept((*self.xhat.tensors, *affine), form)

    @property
    def exact(self) -> bool:
        """Whether c has to be exact: x̂ is kept at a rank, not rounded."""
        return not isinstance(self.xhat.form, Rounded)


def normalise(
    x: Tensor, weight_N: Tensor | None, bias_N: Tensor | None, norm: Norm, estimator: Estimator, dtype: torch.dtype
) -> tuple[Tensor, Normed]:
    """The norm's output, and what its readers need to know of it.

    Args:
        x: (..., n).
        weight_N: γ, (n,) or None.
        bias_N: β, (n,) or None.
        norm: eps, the offset of γ, and whether the mean is taken off.
        estimator: keeps x̂.
        dtype: of the output.

    Returns:
        y (..., n), equal to the norm's own to rounding. Its gradient goes through x̃ with
        ``c = mean(γ g x̃)``, for readers that bring no exact one.
    """
    x_MN = x.detach().reshape(-1, x.shape[-1])
    m, n = x_MN.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    stored = estimator if isinstance(estimator, Stored) else None
    bits, noise = (stored.bits, stored.noise(m, n, x.device)) if stored else (None, None)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        y_MN, rho_M1, tensors = kernels.normalise(
            x_MN, norm.scale(weight_N, wide), cast(bias_N, wide), norm.eps, norm.centered, dtype, bits, noise
        )
    if stored is not None:
        xhat = stored.kept(tensors, n, wide)
        if stored.observer is not None:
            xhat_MN = (x_MN - x_MN.mean(-1, keepdim=True) if norm.centered else x_MN) * rho_M1
            stored.observer(xhat_MN, xhat)
    else:
        xhat = estimator.keep(tensors[0], dtype)
    y = apply(_Normed, x, weight_N, bias_N, y_MN.view(x.shape), norm, rho_M1, xhat)
    return y, Normed(norm, x, weight_N, bias_N, rho_M1, xhat)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_N: Tensor | None,
        bias_N: Tensor | None,
        y: Tensor,
        norm: Norm,
        rho_M1: Tensor,
        xhat: Kept,
    ) -> Tensor:
        save(ctx, kept=xhat.tensors, rho=(rho_M1,), norm=(weight_N, bias_N))
        ctx.form, ctx.norm, ctx.shape, ctx.dtype = xhat.form, norm, x.shape, x.dtype
        return y.view_as(y)

    @backward
    def backward(ctx: Any, g: Tensor) -> Gradients:
        tensors = saved(ctx)
        g_MN = g.reshape(-1, g.shape[-1])
        grads = norm_grads(ctx, g_MN, Kept(tensors["kept"], ctx.form), tensors, None)
        return *grads, None, None, None, None


def norm_grads(
    ctx: Any, g_MN: Tensor, xhat: Kept, tensors: Mapping[str, Tensors], scalar_M1: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, γ and β, the first three inputs of an op, as far as they are needed.

    Args:
        ctx: the op's, with its ``norm``, and x's ``shape`` and ``dtype``.
        g_MN: dL/dy.
        xhat: what is kept of x̂.
        tensors: the op's saved tensors; here ``rho`` and ``norm``, which is γ and β.
        scalar_M1: Σ_i ⟨dz_i, z_i − b_i⟩ of each token, exact; None where it is not known.
    """
    (rho_M1,), (weight_N, bias_N) = tensors["rho"], tensors["norm"]
    dx = dw_N = db_N = None
    stored, bits = encoded(xhat)
    if ctx.needs_input_grad[0]:
        if scalar_M1 is not None and bias_N is not None:
            scalar_M1 = scalar_M1 - (g_MN @ bias_N.to(g_MN.dtype)).unsqueeze(1)
        gamma_N = ctx.norm.scale(weight_N, rho_M1.dtype)
        dx = kernels.norm_input_grad(g_MN, rho_M1, stored, bits, gamma_N, scalar_M1, ctx.norm.centered, ctx.dtype)
        dx = dx.view(ctx.shape)
    if ctx.needs_input_grad[1]:
        dw_N = kernels.norm_weight_grad(g_MN, stored, bits).to(weight_N.dtype)
    if ctx.needs_input_grad[2]:
        db_N = g_MN.sum(0, dtype=rho_M1.dtype).to(bias_N.dtype)
    return dx, dw_N, db_N
