"""From a norm's output to that of the down projection: an MLP as one operation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.estimators.base import Estimator, Kept
from prac.estimators.codes import Coding
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
    keep: Sequence[Estimator],
    *,
    gate_first: bool = True,
) -> Tensor:
    """``f(g) u Wᵀ + b``, or ``f(a) Wᵀ + b``, with g, u and a linear in a norm's output.

    Has y from the norm's x̂, and keeps g and u, or a, in few bits, rounded to nearest since f follows. The
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
        keep: estimators of g and u, or the one of a where there is no product; kernels can write for them.
        gate_first: where one layer gives both, whether the gate is its first half.
    """
    flat = [t for layer in (*into, down) for t in layer]
    kept = normed.kept(autocast_dtype(y), uses=sum(weight_ON.requires_grad for weight_ON, _ in into))
    return apply(_NormMLP, y, normed.scalars_M2, kept, (function, keep, gate_first), *flat)


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scalars_M2: Tensor | None,
        kept: Kept,
        setting: tuple[str, Sequence[Estimator], bool],
        *layers: Any,  # weights and biases in turn
    ) -> Tensor:
        function, keep, gate_first = setting
        is_gated = len(keep) == 2
        weights, biases = layers[::2], layers[1::2]
        dtype = autocast_dtype(y)
        with without_autocast(y.device.type):
            y_MN = y.to(dtype).reshape(-1, y.shape[-1])
            zs = [F.linear(y_MN, w.to(dtype), cast(b, dtype)) for w, b in zip(weights[:-1], biases[:-1], strict=True)]
            if len(zs) < 1 + is_gated:
                zs = list(_halves(zs[0], gate_first))
            kernel = kernels.gated if is_gated else kernels.activated
            m, k = zs[0].shape
            h_MK, *written = kernel(*zs, function, *(each.coding(m, k, y.device) or Coding(None) for each in keep))
            hidden = [
                each.kept(tensors, k, dtype, functools.partial(zs.__getitem__, i))
                for i, (each, tensors) in enumerate(zip(keep, written, strict=True))
            ]
            del zs
            out = F.linear(h_MK, weights[-1].to(dtype), cast(biases[-1], dtype))
        exact = scalars_M2 is not None
        save(
            ctx, kept=kept.tensors, g=hidden[0].tensors, u=hidden[1].tensors if is_gated else (), weights=weights,
            biases=biases if exact else (),
        )  # fmt: skip
        ctx.exact, ctx.function, ctx.gate_first, ctx.shape, ctx.dtype = exact, function, gate_first, y.shape, y.dtype
        ctx.form, ctx.hidden = kept.form, [each.form for each in hidden]
        ctx.biases = [None if b is None else b.dtype for b in biases]
        return shaped(out, y.shape)

    @backward
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        tensors = saved(ctx)
        needs_down, needs_down_bias = ctx.needs_input_grad[-2:]
        dout_MO = dout.reshape(-1, dout.shape[-1])
        *into, down_OK = tensors["weights"]
        dh_MK = dout_MO @ down_OK.to(dout.dtype)
        hidden = [form.codes(tensors[name]) for form, name in zip(ctx.hidden, ("g", "u"), strict=False)]
        if len(hidden) == 2:
            h_MK, dg_MK, du_MK, scalar_M1 = kernels.gated_backward(dh_MK, *hidden, ctx.function, ctx.exact)
            both = [dg_MK, du_MK] if ctx.gate_first else [du_MK, dg_MK]
            rows = [dg_MK, du_MK] if len(into) == 2 else [torch.cat(both, dim=1)]
            del both
            del dg_MK, du_MK
        else:
            h_MK, da_MK, scalar_M1 = kernels.activated_backward(dh_MK, *hidden, ctx.function, ctx.exact)
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
