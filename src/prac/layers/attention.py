"""Any module that calls ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prac.config import Keep, Kind
from prac.estimators.base import Estimator
from prac.layers.base import TRANSFORMED, Compressed, is_transformed
from prac.layers.marks import mark
from prac.layers.record import Match
from prac.layers.way import Difference
from prac.ops.attention import Call, attention, choose, enough
from prac.runtime.autocast import autocast_dtype
from prac.runtime.fake import is_fake


class Attention(Compressed):
    """Keeps q, k, v and the output of attention in few bits; the projection that reads the output shares it.

    The module's own forward runs, with torch's attention function replaced inside it. So it does not
    matter whose module it is.
    """

    kind: ClassVar[Kind] = "attention"
    in_full: ClassVar[str] = "q, k, v and the output stay in full"

    def _in_training(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and result."""
        if is_transformed():
            return self._in_its_own_way(TRANSFORMED, args, kwargs)
        self._prac.begin(None)
        with _Replaced(self):
            return self._original(*args, **kwargs)

    def _differences(self) -> Iterator[Difference]:
        """None: its own forward runs, whatever that is."""
        return iter(())

    def enough_bits(self, query: Tensor, key: Tensor, scale: float | None) -> dict[str, Estimator]:
        """Its estimators, those of q and k with as many bits as the size of the scores asks for.

        Decided at the first step and whenever the steps have doubled, so that the sizes are seldom waited for, and a
        checkpoint computed again finds the same.
        """
        record, q, k = self._prac, self.estimators["q"], self.estimators["k"]
        step = q.clock.step
        if step >= record.due and not is_fake(query):
            record.due = max(1, 2 * step)
            q.bits = k.bits = enough(query, key, scale, record.match.facts)
        return self.estimators


class _Replaced(TorchFunctionMode):
    """Inside, ``F.scaled_dot_product_attention`` is :func:`prac.ops.attention`, where that can stand in for it."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(self.layer, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    layer: Attention,
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
    wanted = any(t.requires_grad for t in (query, key, value))
    call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    backend = choose(call) if wanted else ""
    if not wanted:
        layer.keep_nothing()
    elif isinstance(backend, str):
        layer.depart(f"{backend}: {layer.in_full}", "in full")
    if isinstance(backend, str):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    layer._prac.reads = autocast_dtype(query)
    layer._prac.keys_per_query = key.shape[-2] / query.shape[-2]
    out, kept = attention(
        query, key, value, layer.enough_bits(query, key, scale),
        mask=attn_mask, dropout=dropout_p, causal=is_causal, scale=scale, gqa=enable_gqa, backend=backend,
    )  # fmt: skip
    return mark(out, kept, width=out.shape[1] * out.shape[3])


def match(widths: tuple[int, int, int], bits: Keep | None) -> Match:
    """For a module that was seen to call attention with q, k and v of so many features (all heads together)."""
    q, k, v = widths
    return Match(Attention, {"q": q, "k": k, "v": v, "out": q}, bits)
