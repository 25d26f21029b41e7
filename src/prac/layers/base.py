"""A compressed layer: the user's own module, with its class swapped for a subclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prac.config import Kind
from prac.estimator import Estimator


class Compressed(nn.Module):
    """Mixed into the class of a module, in front of it, by :func:`swap`.

    The module stays the same object with the same parameters, hooks, names and state_dict;
    only ``forward`` changes, and only for training steps: in eval mode, under ``no_grad``
    and where nothing needs a gradient, the original runs.

    ``torch.compile`` leaves training steps of the layer out of its graphs: subspaces, clocks and random numbers live
    between calls, where a graph could not follow them. The layer's own kernels are compiled (:mod:`prac.fused`), what
    lies between layers is compiled as ever, and so is everything in eval mode.
    """

    kind: ClassVar[Kind]
    statistics: ClassVar[int] = 0  # numbers per token kept exactly, beside Z
    estimators: dict[str, Estimator]  # one for each tensor the layer keeps
    suspended = False  # keep everything in full for a while

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, in training with what it keeps compressed."""
        if self.suspended or not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return self._outside_graphs(*args, **kwargs)

    def _outside_graphs(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`_compressed`; :func:`swap` hides it from torch.compile."""
        raise NotImplementedError

    def _compressed(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer does in training."""
        raise NotImplementedError

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before."""
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """The original's, and how the input is kept."""
        labels = {e.label() for e in self.estimators.values() if e.width is not None}
        return ", ".join(filter(None, [super().extra_repr(), *(f"kept={label}" for label in sorted(labels))]))


@dataclass(frozen=True)
class Match:
    """A module that can be compressed, and how."""

    layer: type[Compressed]
    inputs: dict[str, int | None]  # the tensors it keeps, by name, and their widths where known
    attributes: dict[str, Any] = field(default_factory=dict)  # what its forward has to know
    shareable: bool = False  # it keeps its own input, so its neighbours may read the same tensor
    grouped: type[Compressed] | None = None  # the layer to use where a norm shares its x̂ with those that read it


def trained(*tensors: Tensor | None) -> bool:
    """Whether any of them needs a gradient."""
    return any(t is not None and t.requires_grad for t in tensors)


_swapped: dict[tuple[type[Compressed], type[nn.Module]], type[nn.Module]] = {}


def swap(module: nn.Module, match: Match, estimators: dict[str, Estimator]) -> None:
    """Turn ``module`` into a compressed one, in place."""
    original = type(module)
    key = (match.layer, original)
    if key not in _swapped:
        hidden = torch.compiler.disable(match.layer._compressed, reason="prac keeps activations outside of graphs")
        _swapped[key] = type(
            f"Prac{original.__name__}", key, {"__module__": original.__module__, "_outside_graphs": hidden}
        )
    module.__class__ = _swapped[key]
    module.estimators = estimators  # type: ignore[assignment]
    for name, value in match.attributes.items():
        setattr(module, name, value)


def unswap(module: Compressed, match: Match) -> None:
    """The inverse of :func:`swap`."""
    for name in ("estimators", "suspended", "_prac_group", *match.attributes):
        vars(module).pop(name, None)
    module.__class__ = type(module).__bases__[1]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked on to the module, and would miss a call that is made without it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(not getattr(hook, "only_counts", False) for table in hooks for hook in table.values())


def overrides_forward(module: nn.Module) -> bool:
    """Whether this one instance has a forward of its own, which would bypass its class's."""
    return "forward" in vars(module)
