"""A norm whose x̂ is kept once, for its own backward and for every linear layer that reads its output.

    x̂ = (x − μ) ρ,      y = γ x̂ + β,      z_i = y W_iᵀ + b_i,      g = dL/dy = Σ dz_i W_i

    dL/dx = ρ (γ g − x̂ c  [− mean(γ g)]),      c = mean(γ g x̂) = (Σ_i ⟨dz_i, z_i − b_i⟩ − ⟨g, β⟩) / n

(μ and the last term are LayerNorm's). A noisy x̃ in place of x̂ is harmless in dL/dx except within
c, where it adds up along x̂. But c is one number per token, and it is known exactly from the outputs
of those that read y. With it dL/dx is linear in x̃: unbiased where x̃ is, with a noise of c (x̃ − x̂).

Gradients go through y as ever, so its hooks see them. Where x̃ is all of x̂ rounded with a relative error of e,
c comes from x̃: that costs a relative error of about e / √n in dL/dx, less than the rounding itself does.
Where x̂ is at a rank the norm has a second output, a few numbers per token that its readers take beside y: what they
return as its gradient is their part of the exact c, which autograd adds up as it does g. They also return
⟨dy_i, s⟩ for a fixed vector of signs s. Where the sum of those is ⟨g, s⟩, g is all theirs; where it is not (somebody
else reads y, or a hook changed g), c comes from x̃.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prac.estimators.base import Estimator, Form, Kept
from prac.estimators.codes import Coding, Tensors
from prac.ops import kernels
from prac.ops.function import Gradients, apply, backward, cast, save, saved, shaped
from prac.runtime.autocast import without_autocast


class Norm(NamedTuple):
    """What a norm does: ``(offset + γ) x̂ + β``, centered for LayerNorm."""

    eps: Any  # a float; None, in what is noted of a layer, for the machine epsilon of its input
    offset: float
    centered: bool

    def scale(self, weight_N: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """``offset + γ``."""
        return None if weight_N is None else weight_N.detach().to(dtype) + self.offset


class Decoded:
    """A norm's output as the first of its readers had it again in backward, for those that come after it.

    The last one lets go of it; where one of them does not come by, the norm's own backward or the end of the pass does.
    """

    def __init__(self) -> None:
        self._y_MN: Tensor | None = None
        self._uses = self._left = 0

    def expect(self, uses: int) -> None:
        """So many more weights will ask for it."""
        self._uses += uses
        self._left += uses

    def get(self, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The output in ``dtype``, (M, n)."""
        y_MN = self._y_MN
        if y_MN is None or y_MN.dtype != dtype:
            y_MN = make()
            if torch.compiler.is_compiling():  # compiled autograd, whose passes have no end that one could wait for
                return y_MN
            torch.autograd.Variable._execution_engine.queue_callback(self.forget)
        self._left -= 1
        self._y_MN = y_MN if self._left > 0 else None
        return y_MN

    def forget(self) -> None:
        """Let go of it, and be as before the pass."""
        self._y_MN, self._left = None, self._uses


@dataclass(frozen=True, eq=False)
class Affine(Form):
    """The form of ``y = γ x̂ + β`` where x̂ is what is kept. Its last tensors are γ and β, those that there are."""

    xhat: Form
    norm: Norm
    weight: bool
    bias: bool
    dtype: torch.dtype
    decoded: Decoded

    @property
    def complete(self) -> bool:  # type: ignore[override]
        """As x̂ is."""
        return self.xhat.complete

    def _split(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensors, Tensor | None, Tensor | None]:
        count = len(tensors) - self.weight - self.bias
        weight_N = self.norm.scale(tensors[count], dtype) if self.weight else None
        return tensors[:count], weight_N, tensors[-1].to(dtype) if self.bias else None

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """``γ x̃ + β``, (M, n)."""
        kept, weight_N, bias_N = self._split(tensors, torch.promote_types(self.dtype, torch.float32))
        return kernels.read_normalised(self.xhat.codes(kept), weight_N, bias_N, self.dtype)

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """``dyᵀ (γ x̃ + β)``, (O, n)."""
        if self.complete:
            y_MN = self.decoded.get(self.dtype, lambda: self.reconstruct(tensors))
            return dy_MO.mT @ y_MN.to(dy_MO.dtype)
        kept, weight_N, bias_N = self._split(tensors, dy_MO.dtype)
        dw_ON = self.xhat.weight_grad(dy_MO, kept)
        dw_ON = dw_ON if weight_N is None else dw_ON * weight_N
        return dw_ON if bias_N is None else dw_ON.addr_(dy_MO.sum(0), bias_N)


class Normed(NamedTuple):
    """What readers of a norm's output need to know of it; holds nothing that the norm does not keep itself."""

    norm: Norm
    weight: Tensor | None
    bias: Tensor | None
    xhat: Kept
    # (M, 2), the norm's second output, for readers that bring the exact c; None where c comes from x̃.
    scalars_M2: Tensor | None
    decoded: Decoded

    def kept(self, dtype: torch.dtype, uses: int = 1) -> Kept:
        """What is kept of y itself, to be read in ``dtype`` for the gradients of so many weights."""
        self.decoded.expect(uses)
        affine = tuple(t for t in (self.weight, self.bias) if t is not None)
        form = Affine(self.xhat.form, self.norm, self.weight is not None, self.bias is not None, dtype, self.decoded)
        return Kept((*self.xhat.tensors, *affine), form)


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
        y (..., n), equal to the norm's own to rounding.
    """
    kept: list[Kept] = []
    decoded = Decoded()
    y, scalars_M2 = apply(_Normed, x, weight_N, bias_N, norm, estimator, dtype, kept, decoded)
    return y, Normed(norm, weight_N, bias_N, kept[0], scalars_M2, decoded)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_N: Tensor | None,
        bias_N: Tensor | None,
        norm: Norm,
        estimator: Estimator,
        dtype: torch.dtype,
        kept_out: list[Kept],
        decoded: Decoded,
    ) -> tuple[Tensor, Tensor | None]:
        x_MN = x.reshape(-1, x.shape[-1])
        m, n = x_MN.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        coding = estimator.coding(m, n, x.device)
        with without_autocast(x.device.type):
            y_MN, rho_M1, tensors = kernels.normalise(
                x_MN, norm.scale(weight_N, wide), cast(bias_N, wide), norm.eps, norm.centered, dtype,
                coding or Coding(None),
            )  # fmt: skip
        if coding is None:
            xhat = estimator.keep(tensors[0], dtype)
        else:
            xhat = estimator.kept(
                tensors, n, wide, lambda: (x_MN - x_MN.mean(-1, keepdim=True) if norm.centered else x_MN) * rho_M1
            )
        kept_out.append(xhat)
        save(ctx, kept=xhat.tensors, rho=(rho_M1,), norm=(weight_N, bias_N))
        ctx.form, ctx.norm, ctx.shape, ctx.dtype, ctx.decoded = xhat.form, norm, x.shape, x.dtype, decoded
        ctx.set_materialize_grads(False)
        exact = not xhat.form.complete and ctx.needs_input_grad[0]
        return shaped(y_MN, x.shape), rho_M1.new_zeros(1).expand(m, 2) if exact else None

    @backward
    def backward(ctx: Any, g: Tensor | None, scalars_M2: Tensor | None = None) -> Gradients:
        ctx.decoded.forget()
        if g is None:
            return (None,) * 8
        tensors = saved(ctx)
        (rho_M1,), (weight_N, bias_N) = tensors["rho"], tensors["norm"]
        g_MN = g.reshape(-1, g.shape[-1])
        dx = dw_N = db_N = None
        xhat = ctx.form.codes(tensors["kept"])
        if ctx.needs_input_grad[0]:
            exact = None if scalars_M2 is None else _exact(scalars_M2, g_MN, bias_N)
            gamma_N = ctx.norm.scale(weight_N, rho_M1.dtype)
            dx_MN = kernels.norm_input_grad(g_MN, rho_M1, xhat, gamma_N, exact, ctx.norm.centered, ctx.dtype)
            dx = dx_MN.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw_N = kernels.norm_weight_grad(g_MN, xhat).to(weight_N.dtype)
        if ctx.needs_input_grad[2]:
            db_N = g_MN.sum(0, dtype=rho_M1.dtype).to(bias_N.dtype)
        return dx, dw_N, db_N, None, None, None, None, None


def scalars_grad(dy_MN: Tensor, scalar_M1: Tensor) -> Tensor:
    """What a reader returns as the gradient of a norm's second output, (M, 2): its ⟨dz, z − b⟩, and ⟨dy, s⟩."""
    return torch.cat([scalar_M1, (dy_MN @ _signs(dy_MN)).unsqueeze(1).to(scalar_M1.dtype)], dim=1)


def _exact(scalars_M2: Tensor, g_MN: Tensor, bias_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """``n c`` of each token by what its readers brought, (M, 1), and whether that is all of it."""
    scalar_M1, theirs_M1 = scalars_M2[:, :1], scalars_M2[:, 1:]
    if bias_N is not None:
        scalar_M1 = scalar_M1 - (g_MN @ bias_N.to(g_MN.dtype)).unsqueeze(1)
    # Rounding moves ⟨g, s⟩ by an eps of ‖g‖ or so; what others add shows as soon as it is a few of those.
    tolerance = max(4 * torch.finfo(g_MN.dtype).eps, 1e-5)
    norm_M1 = torch.linalg.vector_norm(g_MN, dim=-1, keepdim=True, dtype=scalars_M2.dtype)
    missing_M1 = (g_MN @ _signs(g_MN)).unsqueeze(1).to(scalars_M2.dtype) - theirs_M1
    return scalar_M1, missing_M1.abs() <= tolerance * norm_M1


def _signs(like_MN: Tensor) -> Tensor:
    """±1 (n,), the s above, without a pattern that a gradient could have."""
    n = like_MN.shape[1]
    turns_N = torch.arange(n, device=like_MN.device, dtype=torch.float32).square() * 0.618034
    return torch.where(turns_N.frac() < 0.5, 1.0, -1.0).to(like_MN.dtype)
