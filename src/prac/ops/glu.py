"""The gated product ``f(g) · u`` of SwiGLU and GeGLU MLPs, as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prac.estimators.base import Estimator
from prac.ops.elementwise import Activation
from prac.ops.function import Gradients, apply, backward, save, saved


def glu(
    g: Tensor,
    u: Tensor,
    function: Activation,
    keep_g: Estimator,
    keep_u: Estimator,
    *,
    compute: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``function(g) * u`` that keeps compressed ``g`` and ``u``, and not ``function(g)``.

    ``du = f(g̃) · dy`` and ``dg = f'(g̃) · (dy · ũ)``. The output is exact. The gradients are
    biased through f and f', as in :func:`prac.ops.activation`; that of g̃ and ũ together is
    not, since the two are drawn independently.

    Args:
        g: the gate, (..., m).
        u: the other factor, (..., m).
        function: one of :data:`prac.ops.ACTIVATIONS`.
        keep_g: keeps ``g``.
        keep_u: keeps ``u``.
        compute: how to compute ``function(g)`` in the output, as in :func:`prac.ops.activation`.
    """
    return apply(_GLU, g, u, function, keep_g, keep_u, compute or function.forward)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        u: Tensor,
        function: Activation,
        keep_g: Estimator,
        keep_u: Estimator,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        kept_g = keep_g.keep(g)  # both gradients need it
        kept_u = keep_u.keep(u) if ctx.needs_input_grad[0] else None
        save(ctx, g=kept_g.tensors, u=kept_u.tensors if kept_u else ())
        ctx.forms = (kept_g.form, kept_u.form if kept_u else None)
        ctx.function, ctx.shape = function, g.shape
        return compute(g) * u

    @backward
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        (form_g, form_u), kept = ctx.forms, saved(ctx)
        g = form_g.reconstruct(kept["g"]).view(ctx.shape)
        dg = du = None
        if ctx.needs_input_grad[0]:
            u = form_u.reconstruct(kept["u"]).view(ctx.shape)
            dg = ctx.function.backward((dy * u).to(g.dtype), g)
        if ctx.needs_input_grad[1]:
            du = ctx.function.forward(g) * dy
        return dg, du, None, None, None, None
