"""From a norm's output to that of the down projection: an MLP as one operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.config import Bits
from prac.estimators.base import Kept, Tensors
from prac.ops import kernels
from prac.ops.function import Gradients, apply, backward, cast, save, saved, shaped
from prac.ops.shared_norm import Normed, scalars_grad
from prac.runtime.autocast import autocast_dtype, without_autocast

Parameters = tuple[Tensor, Tensor | None]  # of a linear layer: weight (o, n) and bias (o,)


def norm_mlp(
    y: Tensor,
    normed: Normed,
    into: Sequence[Parameters],
    down: Parameters,
    function: str,
    bits: Bits | None,
    *,
    is_gated: bool,
    gate_first: bool = True,
    seen: Callable[[Tensor, Tensors], None] | None = None,
) -> Tensor:
    """``f(g) u Wᵀ + b``, or ``f(a) Wᵀ + b``, with g, u and a linear in a norm's output.

    Has y from the norm's x̂, and keeps g and u, or a, in ``bits``, rounded to nearest since f follows. The
    hidden h = f(g) u is computed again from them for the gradient of ``down``, and so is the
    exact scalar of the norm. The output is exact. The gradients are those at the rounded g and u:
    off by about the rounding's own relative error (half a percent for 8 bits, 9% for 4) on the part
    of the gradient that goes through the MLP.

    Args:
        y: the norm's output, (..., n).
        normed: what :func:`prac.ops.shared_norm.normalise` returned with it.
        into: weight and bias of gate and up, of one layer for both, or of the one layer of an MLP without gate.
        down: weight (o, k) and bias.
        function: a name in :data:`prac.ops.ACTIVATIONS`.
        bits: of g and u, or a; None keeps them in full.
        is_gated: whether there is a product.
        gate_first: where one layer gives both, whether the gate is its first half.
        seen: called with g, and what is kept of it, and then with u.
    """
    flat = [t for layer in (*into, down) for t in layer]
    setting = (function, bits, is_gated, gate_first, seen)
    return apply(_NormMLP, y, normed.scalars_M2, normed.kept(autocast_dtype(y)), setting, *flat)


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scalars_M2: Tensor | None,
        kept: Kept,
        setting: tuple[str, Bits | None, bool, bool, Callable[[Tensor, Tensors], None] | None],
        *layers: Any,  # weights and biases in turn
    ) -> Tensor:
        function, bits, is_gated, gate_first, seen = setting
        weights, biases = layers[::2], layers[1::2]
        dtype = autocast_dtype(y)
        with without_autocast(y.device.type):
            y_MN = y.to(dtype).reshape(-1, y.shape[-1])
            zs = [F.linear(y_MN, w.to(dtype), cast(b, dtype)) for w, b in zip(weights[:-1], biases[:-1], strict=True)]
            if len(zs) < 1 + is_gated:
                zs = list(_halves(zs[0], gate_first))
            kernel = kernels.gated if is_gated else kernels.activated
            h_MK, *stored = kernel(*zs, function, bits)
            if seen is not None:
                for z_MK, its in zip(zs, stored, strict=True):
                    seen(z_MK, its)
            del zs
            out = F.linear(h_MK, weights[-1].to(dtype), cast(biases[-1], dtype))
        exact = scalars_M2 is not None
        save(
            ctx, kept=kept.tensors, g=stored[0], u=stored[1] if is_gated else (), weights=weights,
            biases=biases if exact else (),
        )  # fmt: skip
        ctx.exact, ctx.setting, ctx.form, ctx.shape, ctx.dtype = exact, setting[:4], kept.form, y.shape, y.dtype
        ctx.biases = [None if b is None else b.dtype for b in biases]
        return shaped(out, y.shape)

    @backward
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        tensors = saved(ctx)
        function, bits, is_gated, gate_first = ctx.setting
        needs_down, needs_down_bias = ctx.needs_input_grad[-2:]
        dout_MO = dout.reshape(-1, dout.shape[-1])
        *into, down_OK = tensors["weights"]
        dh_MK = dout_MO @ down_OK.to(dout.dtype)
        if is_gated:
            h_MK, dg_MK, du_MK, scalar_M1 = kernels.gated_backward(
                dh_MK, tensors["g"], tensors["u"], bits, function, ctx.exact
            )
            rows = [dg_MK, du_MK] if len(into) == 2 else [torch.cat([dg_MK, du_MK][:: 1 if gate_first else -1], dim=1)]
            del dg_MK, du_MK
        else:
            h_MK, da_MK, scalar_M1 = kernels.activated_backward(dh_MK, tensors["g"], bits, function, ctx.exact)
            rows = [da_MK]
            del da_MK
        del dh_MK
        ddown_OK = (dout_MO.mT @ h_MK).to(down_OK.dtype) if needs_down else None
        del h_MK
        if ctx.exact:
            for dz_MO, bias_O in zip(rows, tensors["biases"], strict=False):
                if bias_O is not None:
                    scalar_M1 = scalar_M1 - (dz_MO @ bias_O.to(dz_MO.dtype)).unsqueeze(1)
        needs, grads = ctx.needs_input_grad[4:], []
        for i, dz_MO in enumerate(rows):
            dw_ON = ctx.form.weight_grad(dz_MO, tensors["kept"]).to(into[i].dtype) if needs[2 * i] else None
            db_O = dz_MO.sum(0).to(ctx.biases[i]) if needs[2 * i + 1] else None
            grads += [dw_ON, db_O]
        dy = dscalars_M2 = None
        if ctx.needs_input_grad[0]:
            dy_MN = rows[0] @ into[0].to(rows[0].dtype)
            for dz_MO, weight_ON in zip(rows[1:], into[1:], strict=True):
                dy_MN.addmm_(dz_MO, weight_ON.to(dz_MO.dtype))
            dy_MN = dy_MN.to(ctx.dtype)
            dscalars_M2 = scalars_grad(dy_MN, scalar_M1) if ctx.exact else None
            dy = dy_MN.view(ctx.shape)
        dbias_O = dout_MO.sum(0).to(ctx.biases[-1]) if needs_down_bias else None
        return dy, dscalars_M2, None, None, *grads, ddown_OK, dbias_O


def _halves(z_MK: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = z_MK.chunk(2, dim=1)
    return (first, second) if gate_first else (second, first)
