"""A norm and the linear layers that read its output, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.estimator import Estimator, Kept, Tensors
from prac.ops import kernels
from prac.ops.function import Gradients, autocast_dtype, backward, cast, save, saved
from prac.ops.normed import Normed, norm_grads

Parameters = tuple[Tensor, Tensor | None]  # of a linear layer: weight (o, n) and bias (o,)


def norm_linears(
    y: Tensor, normed: Normed, layers: Sequence[Parameters], outputs: Sequence[Estimator | None] = ()
) -> tuple[Tensor, ...]:
    """``z_i = y W_iᵀ + b_i`` for every layer, back to the norm's input in one operation.

    One x̂, kept already, serves the gradients of the norm and of all weights:
    ``dW_i = (dz_iᵀ x̃) γ + (Σ dz_i) βᵀ``. See :mod:`prac.ops.normed` for that of x.

    Args:
        y: the norm's output, (..., n).
        normed: what :func:`prac.ops.normed.normalise` returned with it.
        layers: weight and bias of each.
        outputs: how each z_i is kept for the exact scalar c; needed where x̂ is at a rank. Unbiased
            rounding of z leaves dL/dx unbiased.
    """
    flat = [t for layer in layers for t in layer]
    inputs = (normed.x, normed.weight, normed.bias, y.detach(), normed, outputs, *flat)
    zs: tuple[Tensor, ...] = _NormLinears.apply(*inputs)  # type: ignore[no-untyped-call]
    return zs


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_N: Tensor | None,
        bias_N: Tensor | None,
        y: Tensor,
        normed: Normed,
        outputs: Sequence[Estimator | None],
        *layers: Any,  # weights and biases in turn
    ) -> tuple[Tensor, ...]:
        weights, biases = layers[::2], layers[1::2]
        dtype = autocast_dtype(y)
        with torch.autocast(y.device.type, enabled=False):
            y = y.to(dtype)
            zs = tuple(F.linear(y, w.to(dtype), cast(b, dtype)) for w, b in zip(weights, biases, strict=True))
        exact = normed.exact and ctx.needs_input_grad[0]
        kept_zs = [keep.keep(z) for keep, z in zip(outputs, zs, strict=True) if keep] if exact else []
        ctx.zs = [k.form for k in kept_zs]
        outputs_kept = {f"z{i}": k.tensors for i, k in enumerate(kept_zs)}
        save_group(ctx, normed, dtype, weights, biases, exact=exact, **outputs_kept)
        return zs

    @backward
    def backward(ctx: Any, *dzs: Tensor) -> Gradients:
        tensors = saved(ctx)
        rows = [dz.reshape(-1, dz.shape[-1]) for dz in dzs]
        scalar_M1 = None
        for i, form in enumerate(ctx.zs):
            s_M1 = kernels.inner(rows[i], form.reconstruct(tensors[f"z{i}"]), tensors["biases"][i])
            scalar_M1 = s_M1 if scalar_M1 is None else scalar_M1 + s_M1
        norm, grads = group_grads(ctx, tensors, rows, ctx.biases, scalar_M1, first=6)
        return *norm, None, None, None, *grads


def save_group(
    ctx: Any,
    normed: Normed,
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    exact: bool,
    **own: Tensors,
) -> None:
    """Save what :func:`group_grads` asks for, and the op's ``own``; biases only where the scalar is exact."""
    norm = (normed.weight, normed.bias)
    biases_saved = biases if exact else [None] * len(biases)
    save(ctx, xhat=normed.xhat.tensors, rho=(normed.rho_M1,), norm=norm, weights=weights, biases=biases_saved, **own)
    ctx.y, ctx.xhat, ctx.norm = normed.kept(dtype).form, normed.xhat.form, normed.norm
    ctx.shape, ctx.dtype = normed.x.shape, normed.x.dtype
    ctx.biases = [None if b is None else b.dtype for b in biases]


def group_grads(
    ctx: Any,
    tensors: dict[str, Tensors],
    rows: Sequence[Tensor],
    bias_dtypes: Sequence[torch.dtype | None],
    scalar_M1: Tensor | None,
    *,
    first: int,
) -> tuple[Gradients, list[Tensor | None]]:
    """Gradients of the norm (x, γ, β) and of the layers (W_1, b_1, W_2, …) from ``rows``, the dz_i.

    ``first`` is where the layers begin among the op's inputs.
    """
    needs = ctx.needs_input_grad[first:]
    # y is had from x̂, γ and β, which are saved once.
    y = Kept((*tensors["xhat"], *(t for t in tensors["norm"] if t is not None)), ctx.y)
    layers: list[Tensor | None] = []
    for i, dz_MO in enumerate(rows):
        weight_ON, bias_dtype = tensors["weights"][i], bias_dtypes[i]
        dw_ON = y.weight_grad(dz_MO).to(weight_ON.dtype) if needs[2 * i] else None
        db_O = dz_MO.sum(0).to(bias_dtype) if needs[2 * i + 1] and bias_dtype is not None else None
        layers += [dw_ON, db_O]
    norm: Gradients = (None, None, None)
    if any(ctx.needs_input_grad[:3]):
        g_MN = rows[0] @ tensors["weights"][0].to(rows[0].dtype)
        for dz_MO, weight_ON in zip(rows[1:], tensors["weights"][1 : len(rows)], strict=True):
            g_MN.addmm_(dz_MO, weight_ON.to(dz_MO.dtype))
        norm = norm_grads(ctx, g_MN, Kept(tensors["xhat"], ctx.xhat), tensors, scalar_M1)
    return norm, layers
