"""``nn.Linear`` and Hugging Face's ``Conv1D``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from prac.config import Kind
from prac.layers.base import Compressed, Match
from prac.ops import linear


class Linear(Compressed):
    """Keeps Z = X P in place of X for its weight's gradient."""

    kind: ClassVar[Kind] = "linear"
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., o)."""
        if not self._compresses(self.weight):
            y: Tensor = super().forward(x)
            return y
        return linear(x, self.weight, self.bias, self.subspaces["x"])


class Conv1D(Linear):
    """The same with its weight stored as (n, o), as GPT-2 has it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., o)."""
        if not self._compresses(self.weight):
            return super().forward(x)
        return linear(x, self.weight.mT, self.bias, self.subspaces["x"])


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
