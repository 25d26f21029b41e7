"""What every op shares: how it is run, what it saves, and its backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prac.runtime.autocast import without_autocast
from prac.runtime.processes import among_several

Gradients = tuple[Tensor | None, ...]


@torch.compiler.disable(reason="prac keeps activations outside of graphs")  # type: ignore[untyped-decorator]
def apply(op: type[torch.autograd.Function], *args: Any) -> Any:
    """``op.apply(*args)``, which torch.compile leaves out of its graphs.

    An op keeps what it likes, changes tensors in place and draws random numbers; what a graph makes of that depends on
    the version of torch. In 2.11 an output that was added up in place has no gradient, without a word.
    """
    return op.apply(*args)


def save(ctx: Any, **groups: Sequence[Tensor | None]) -> None:
    """``save_for_backward`` for tensors in named groups of any length."""
    ctx.groups = {name: len(tensors) for name, tensors in groups.items()}
    ctx.save_for_backward(*map(_as_it_is, itertools.chain.from_iterable(groups.values())))


def _as_it_is(tensor: Tensor | None) -> Tensor | None:
    """A parameter's numbers of now, should its ``.data`` be exchanged before backward (weight averaging).

    Among several processes the parameter itself, since that is how sharding (ZeRO) gathers it again.
    """
    if not isinstance(tensor, nn.Parameter) or among_several():
        return tensor
    return tensor.view_as(tensor)


def saved(ctx: Any) -> dict[str, tuple[Any, ...]]:
    """What :func:`save` saved."""
    tensors = iter(ctx.saved_tensors)
    return {name: tuple(itertools.islice(tensors, count)) for name, count in ctx.groups.items()}


def shaped(y_MO: Tensor, shape: Sequence[int]) -> Tensor:
    """``y_MO`` as (..., o), for an op to return: not as a view, which nobody could change in place."""
    y: Tensor = torch.ops.aten._unsafe_view(y_MO, [*shape[:-1], y_MO.shape[-1]])
    return y


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """``tensor.to(dtype)``, also for no tensor."""
    return None if tensor is None else tensor.to(dtype)


def backward(compute: Callable[..., Gradients]) -> Any:
    """Decorates an op's backward.

    Once differentiable: the gradient is an estimate made of constants, and differentiating
    it again would silently ignore how it depends on the input. torch's own decorator notices
    only where the incoming gradient asks for it, so asking for a graph at all is refused.
    Autocast off: a backward called inside an autocast region would otherwise change the
    dtypes chosen in forward.
    """
    once = once_differentiable(compute)

    @functools.wraps(compute)
    def run(ctx: Any, *dys: Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True through a layer compressed by prac: its gradients are estimates and cannot be "
                "differentiated twice. Exclude the layers this goes through, or call handle.restore() before it."
            )
        with without_autocast(dys[0].device.type):
            gradients: Gradients = once(ctx, *dys)
            return gradients

    return staticmethod(run)
