"""Linear layer, ``y = x Wᵀ + b``: exact output and input gradient, estimated weight gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.estimators.base import Estimator, Kept
from prac.ops import kernels
from prac.ops.function import Gradients, apply, backward, cast, save, saved, shaped
from prac.ops.shared_norm import scalars_grad
from prac.runtime.autocast import autocast_dtype, without_autocast


def linear(
    x: Tensor,
    weight_ON: Tensor,
    bias_O: Tensor | None,
    keep: Estimator | Kept,
    *,
    scalars_M2: Tensor | None = None,
    keep_y: Estimator | None = None,
) -> Tensor:
    """``F.linear`` that keeps a compressed ``x`` for the weight's gradient (Algorithm 2).

    ``y`` and ``dx = dy W`` are exact; ``dW = dyᵀ x̃`` is as unbiased as ``x̃`` is (Lemma 3).

    Args:
        x: (..., n), any floating dtype; under autocast it is cast as ``F.linear`` would.
        weight_ON: (o, n).
        bias_O: (o,) or None.
        keep: compresses ``x``, or what is kept of ``x`` already. Not asked where the weight needs
            no gradient.
        scalars_M2: of the norm that x is the output of (:class:`prac.ops.shared_norm.Normed`), where it wants the
            exact c.
        keep_y: keeps ``y`` for that; unbiased rounding leaves the norm's gradient unbiased.
    """
    return apply(_Linear, x, weight_ON, bias_O, keep, scalars_M2, keep_y)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ON: Tensor,
        bias_O: Tensor | None,
        keep: Estimator | Kept,
        scalars_M2: Tensor | None,
        keep_y: Estimator | None,
    ) -> Tensor:
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        dtype = autocast_dtype(x)
        kept = kept_y = None
        if weight_needs_grad:
            kept = keep if isinstance(keep, Kept) else keep.keep(x, dtype)
        # Cast here rather than by autocast itself: its cache would hand a cast made without
        # grad to later users of the same weight. Backward casts again, and so saves a copy.
        with without_autocast(x.device.type):
            # In x's own shape and layout, by which torch chooses the product that it takes, and so the last bit.
            y = F.linear(x.to(dtype), weight_ON.to(dtype), cast(bias_O, dtype))
            y_MO = y.reshape(-1, y.shape[-1])
        if scalars_M2 is not None:
            assert keep_y is not None
            kept_y = keep_y.keep(y_MO)
        save(
            ctx,
            weight=(weight_ON if x_needs_grad else None,),
            bias=(bias_O if kept_y else None,),
            kept=kept.tensors if kept else (),
            y=kept_y.tensors if kept_y else (),
        )
        ctx.form, ctx.y_form, ctx.shape = (kept.form if kept else None), (kept_y.form if kept_y else None), x.shape
        ctx.dtypes = (x.dtype, weight_ON.dtype, None if bias_O is None else bias_O.dtype)
        return shaped(y_MO, x.shape)

    @backward
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        tensors = saved(ctx)
        (weight_ON,) = tensors["weight"]
        dy_MO = dy.reshape(-1, dy.shape[-1])
        dx = dw_ON = db_O = dscalars_M2 = None
        if ctx.needs_input_grad[0]:
            dx_MN = (dy_MO @ weight_ON.to(dy.dtype)).to(x_dtype)
            if ctx.y_form is not None:
                scalar_M1 = kernels.inner(dy_MO, ctx.y_form.reconstruct(tensors["y"]), *tensors["bias"])
                dscalars_M2 = scalars_grad(dx_MN, scalar_M1)
            dx = dx_MN.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw_ON = ctx.form.weight_grad(dy_MO, tensors["kept"]).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            db_O = dy_MO.sum(0).to(bias_dtype)
        return dx, dw_ON, db_O, None, dscalars_M2, None
