"""The parts of a training step: its loss, its subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from prac.layers import Compressed
from prac.subspace import Subspace


def loss_of(output: Any, loss: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The scalar to differentiate.

    Raises:
        ValueError: if there is none.
    """
    value = loss(output) if loss is not None else output
    if not isinstance(value, Tensor):
        value = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
    if not isinstance(value, Tensor) or value.dim() > 0:
        raise ValueError(
            "the model's output has no loss: put labels into the batch, or give loss=, a function of the output."
        )
    return value


def subspaces(model: nn.Module) -> list[Tensor]:
    """Every P, which exists once however large the batch."""
    estimators = [e for m in model.modules() if isinstance(m, Compressed) for e in m.estimators.values()]
    return [e.p_NR for e in estimators if isinstance(e, Subspace) and e.p_NR is not None]
