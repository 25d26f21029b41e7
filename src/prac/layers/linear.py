"""``nn.Linear`` and Hugging Face's ``Conv1D``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.estimators.rounded import by_reference
from prac.layers.base import Compressed, trained
from prac.layers.marks import is_past, may_be_kept, source_of
from prac.layers.record import MAKER, Match
from prac.layers.way import Difference
from prac.ops import Normed, linear
from prac.runtime.autocast import autocast_dtype


class Linear(Compressed):
    """Keeps Z = X P in place of X for its weight's gradient, or nothing where X can be had from what others keep."""

    kind: ClassVar[Kind] = "linear"
    weight: Tensor
    bias: Tensor | None

    def parameters_ON(self) -> tuple[Tensor, Tensor | None]:
        """Weight (o, n) and bias (o,)."""
        return self.weight, self.bias

    def widths(self, weight: Tensor) -> tuple[int, int]:
        """Features in and out, by the number of its weights, since one in few bits has another shape."""
        n = self.estimators["x"].width or getattr(self, "in_features", 0) or weight.shape[0]
        return n, weight.numel() // n

    def is_plain(self) -> bool:
        """Whether it computes what it did, with a weight that is a tensor as any other."""
        own_forward = type(self).forward is Compressed.forward and "forward" not in vars(self)
        weight = self._parameters.get("weight")  # a parametrised one is computed as a tensor as any other
        return own_forward and not self.differs() and (weight is None or not has_operations(weight))

    def _differences(self) -> Iterator[Difference]:
        """That its forward was replaced; of its attributes, which pruning changes, the formula asks nothing."""
        if self._prac.way.is_replaced(self._prac.original):
            yield Difference("the forward of its class was replaced", True)

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., o)."""
        source, keep_y, scalars_M2 = source_of(x), self.estimators.get("y"), None
        if isinstance(source, Normed):
            scalars_M2 = None if keep_y is None else source.scalars_M2
            source = source.kept(autocast_dtype(x), uses=int(trained(self.weight)))
        if has_operations(self.weight):
            return self._in_its_own_way(f"its weight is a {type(self.weight).__name__}", (x,), {})
        if not trained(self.weight) and scalars_M2 is None:
            return self._original(x)
        planned, keep = self._prac.source, source or self.estimators["x"]
        if source is not None and planned is None:
            self.depart("what it reads is kept already", "nothing", warn=False)
        if source is None and planned is not None and trained(self.weight):
            if not x.requires_grad:
                self.depart("what it reads needs no gradient, so that nobody else keeps it", "its own", warn=False)
            elif planned.is_there_anyway and (planned.what != MAKER or may_be_kept(x)):
                keep = by_reference(x, autocast_dtype(x))
            elif planned.is_there_anyway:
                self.depart("the operation that made what it reads does not keep it", "its own", warn=False)
            elif is_past(x):
                why = "what it reads was made in another block, which checkpointing computes again"
                self.depart(f"{why}: it keeps an input of its own", "its own", warn=False)
            else:  # one warning is enough, where the MLP around it has given one
                why = f"what it reads is not made of {planned.what} alone"
                self.depart(f"{why}: it keeps an input of its own", "its own", warn=not self._prac.shared.said)
        return linear(x, *self.parameters_ON(), keep, scalars_M2=scalars_M2, keep_y=keep_y)


class Conv1D(Linear):
    """The same with its weight stored as (n, o), as GPT-2 has it."""

    def parameters_ON(self) -> tuple[Tensor, Tensor | None]:
        """Weight (o, n) and bias (o,)."""
        return self.weight.mT, self.bias


_OF_TENSORS = cast("Any", Tensor.__torch_function__).__func__


def has_operations(tensor: Tensor) -> bool:
    """Whether a tensor has operations of its own (a quantised weight), which prac's would pass over."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    own: Any = type(tensor).__torch_function__
    return own is not torch._C._disabled_torch_function_impl and own.__func__ is not _OF_TENSORS


def recognise(module: nn.Module) -> Match | str | None:
    """A linear layer by what it does: any subclass that keeps ``nn.Linear``'s own forward."""
    if any(p.is_complex() for p in module.parameters(recurse=False)):
        return "complex numbers"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return "a linear layer with a forward of its own (quantised or wrapped)"
        return Match(Linear, {"x": module.in_features}, shareable=True)
    # By its name, since the core does not import transformers.
    if f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        return Match(Conv1D, {"x": module.get_parameter("weight").shape[0]}, shareable=True)
    return None
