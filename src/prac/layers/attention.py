"""Any module that calls ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prac.config import Kind
from prac.estimator import Estimator
from prac.layers.base import Compressed, Match
from prac.ops.attention import attention, runs_here
from prac.source import mark


class Attention(Compressed):
    """Keeps q, k, v and the output of attention in few bits; the projection that reads the output shares it.

    The module's own forward runs, with torch's attention function replaced inside it. So it does not
    matter whose module it is.
    """

    kind: ClassVar[Kind] = "attention"

    def _compressed(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        with _Replaced(self.estimators):
            return self._original(*args, **kwargs)


class _Replaced(TorchFunctionMode):
    """Inside, ``F.scaled_dot_product_attention`` is :func:`prac.ops.attention`, where that can stand in for it."""

    def __init__(self, estimators: Mapping[str, Estimator]) -> None:
        super().__init__()
        self.estimators = estimators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(self.estimators, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    estimators: Mapping[str, Estimator],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, with its signature."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # As torch does before it calls a kernel; of the mask's size, not of the activations'.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    wanted = any(t.requires_grad for t in (query, key, value)) and query.dim() == 4
    if not wanted or not runs_here(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out, kept = attention(
        query, key, value, estimators,
        mask=attn_mask, dropout=dropout_p, causal=is_causal, scale=scale, gqa=enable_gqa,
    )  # fmt: skip
    return mark(out, kept, width=out.shape[1] * out.shape[3])


def match(widths: tuple[int, int, int]) -> Match:
    """For a module that was seen to call attention with q, k and v of so many features (all heads together)."""
    q, k, v = widths
    return Match(Attention, {"q": q, "k": k, "v": v, "out": q})
