"""``nn.Linear`` and Hugging Face's ``Conv1D``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from prac.config import Kind
from prac.layers.base import Compressed, Match, is_hooked, trained
from prac.ops import Normed, linear, norm_linears
from prac.source import source_of


class Linear(Compressed):
    """Keeps Z = X P in place of X for its weight's gradient, or nothing where X can be had from what others keep."""

    kind: ClassVar[Kind] = "linear"
    weight: Tensor
    bias: Tensor | None
    # All the layers, this one too, that alone read the output of one norm; empty for any other layer.
    _prac_group: Sequence[Linear] = ()

    def parameters_ON(self) -> tuple[Tensor, Tensor | None]:
        """Weight (o, n) and bias (o,)."""
        return self.weight, self.bias

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., o)."""
        source = source_of(x)
        if isinstance(source, Normed):
            if self._prac_group and not any(is_hooked(layer) for layer in self._prac_group if layer is not self):
                return self._with_group(x, source)
            source = source.kept(x.dtype)
        if not trained(self.weight):
            return self._original(x)
        return linear(x, *self.parameters_ON(), source or self.estimators["x"])

    def _with_group(self, x: Tensor, normed: Normed) -> Tensor:
        """The first layer called computes the outputs of all, in one operation, and hands out the others'."""
        if id(self) not in normed.outputs:
            layers = [layer.parameters_ON() for layer in self._prac_group]
            outputs = norm_linears(x, normed, layers, [layer.estimators.get("y") for layer in self._prac_group])
            normed.outputs.update(zip(map(id, self._prac_group), outputs, strict=True))
        return normed.outputs.pop(id(self))


class Conv1D(Linear):
    """The same with its weight stored as (n, o), as GPT-2 has it."""

    def parameters_ON(self) -> tuple[Tensor, Tensor | None]:
        """Weight (o, n) and bias (o,)."""
        return self.weight.mT, self.bias


def recognise(module: nn.Module) -> Match | str | None:
    """A linear layer by what it does: any subclass that keeps ``nn.Linear``'s own forward."""
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return "a linear layer with a forward of its own (quantised or wrapped)"
        return Match(Linear, {"x": module.in_features}, shareable=True)
    # By name and shape, since the core does not import transformers.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, Tensor):
        return Match(Conv1D, {"x": module.weight.shape[0]}, shareable=True)
    return None
