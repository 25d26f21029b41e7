"""Element-wise activations: GELU (exact and tanh) and SiLU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prac.estimators.base import Estimator
from prac.ops.function import Gradients, apply, backward


@dataclass(frozen=True)
class Activation:
    """An element-wise function and its backward ``(dy, x) -> dx``."""

    name: str
    forward: Callable[[Tensor], Tensor] = field(compare=False)  # a copied partial function is another one
    backward: Callable[[Tensor, Tensor], Tensor] = field(compare=False)


_gelu_backward = torch.ops.aten.gelu_backward.default

ACTIVATIONS: dict[str, Activation] = {
    function.name: function
    for function in (
        Activation("silu", F.silu, torch.ops.aten.silu_backward.default),
        Activation("gelu", F.gelu, _gelu_backward),
        Activation(
            "gelu_tanh",
            functools.partial(F.gelu, approximate="tanh"),
            functools.partial(_gelu_backward, approximate="tanh"),
        ),
    )
}


def activation(
    x: Tensor, function: Activation, estimator: Estimator, *, compute: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``function(x)`` that keeps a compressed ``x``: ``dx = f'(x̃) · dy`` (Algorithm 2).

    The output is exact. ``dx`` is *biased*, also for an unbiased ``x̃``, because f' is not
    linear: E f'(x̃) differs from f'(x) by about ½ f'''(x) Var(x̃). The paper uses it all the
    same (Section 5.1: "our theoretical analysis does not directly cover all cases").

    Args:
        x: (..., n).
        function: one of :data:`ACTIVATIONS`.
        estimator: keeps ``x``.
        compute: how to compute the output, where it should be another implementation of
            the same function, to the bit; by default ``function.forward``.
    """
    return apply(_Elementwise, x, function, estimator, compute or function.forward)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Activation, estimator: Estimator, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        kept = estimator.keep(x)
        ctx.save_for_backward(*kept.tensors)
        ctx.form, ctx.function, ctx.shape = kept.form, function, x.shape
        return compute(x)

    @backward
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x = ctx.form.reconstruct(ctx.saved_tensors).view(ctx.shape)
        return ctx.function.backward(dy.to(x.dtype), x), None, None, None
