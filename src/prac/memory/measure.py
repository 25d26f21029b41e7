"""What a real training step takes: how many bytes autograd keeps for backward, and the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prac.convert.state import subspaces_of
from prac.memory.allocator import allocated
from prac.memory.breakdown import Breakdown
from prac.memory.kinds import kinds
from prac.runtime.running import Example, call, loss_of, running, tensors_in


@dataclass
class KeptBytes:
    """Bytes kept for backward, by the innermost module that was running when they were saved."""

    by_module: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Their sum: every storage once, whoever saves it again."""
        return sum(self.by_module.values())


@contextmanager
def track_kept(model: nn.Module, batch: Any = ()) -> Iterator[KeptBytes]:
    """Count what autograd saves while the block runs ``model``'s forward pass.

    Each storage counts once, with its whole size, for the module that saved it first, and
    only if it is an activation: not parameters and buffers, not the ``batch`` (where it is given),
    not the subspaces' P, which exist once however large the batch. What is
    saved outside any module of ``model`` (a loss, say) counts under the name ``""``.

    >>> with track_kept(model) as kept:
    ...     loss = model(**batch).loss
    >>> kept.total
    """
    kept = KeptBytes()
    owned = {_storage(t) for t in (*model.parameters(), *model.buffers(), *tensors_in(batch))}
    # Holding on to what was saved keeps its address from being given to another tensor.
    counted: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # An output that its own node saves would keep itself alive; what has no node is left as it is, so that
        # others find it again.
        alone = tensor if tensor.grad_fn is None else tensor.detach()
        key = _storage(tensor)
        # A leaf that needs a gradient, or a view of one: a parameter, also one that FSDP gathered.
        base = tensor if tensor._base is None else tensor._base
        if key not in owned and key not in counted and not (base.is_leaf and base.requires_grad):
            counted[key] = tensor.detach()
            name = names[-1]
            kept.by_module[name] = kept.by_module.get(name, 0) + tensor.untyped_storage().nbytes()
        return alone

    try:
        with running(model) as names, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept
    finally:
        counted.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure(
    model: nn.Module,
    batch: Example,
    *,
    optimizer: Optimizer | None = None,
    autocast: torch.dtype | None = None,
    objective: Callable[[Any], Tensor] | None = None,
) -> Breakdown:
    """The memory of a real training step of ``model``, compressed or not, as :func:`prac.predict` breaks it down.

    Runs forward three times and backward twice: to compile what is compiled, to count what autograd keeps, by module,
    and to watch the allocator. The weights stay as they are, the model's gradients are freed.

    Args:
        model: in the mode and on the device that it trains on.
        batch: its input, as for :func:`prac.compress`, on that device.
        optimizer: its state is counted. Its step is not run; the peak is then nearly always in backward.
        autocast: run the forward pass under autocast to this dtype.
        objective: the scalar to differentiate, of the model's output; by default its ``loss``, or itself.

    Returns:
        A breakdown whose ``at_peak`` has one entry, ``step``, for activations, gradients and temporaries together:
        an allocator does not know them apart.

    Raises:
        ValueError: if the output has no loss.
    """
    device = next(model.parameters()).device

    def forward() -> Tensor:
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return loss_of(call(model, batch), objective)

    model.zero_grad(set_to_none=True)
    forward().backward()
    model.zero_grad(set_to_none=True)
    with track_kept(model, batch) as found:
        forward()
    with allocated(device) as step:
        value = forward()
        step.mark()
        value.backward()
    model.zero_grad(set_to_none=True)

    of = kinds(model)
    kept: dict[str, int] = {}
    for name, count in found.by_module.items():
        kept[of[name]] = kept.get(of[name], 0) + count
    if step.marked > found.total:  # held by others than autograd, such as the inputs of checkpointed blocks
        kept["checkpoint"] = kept.get("checkpoint", 0) + step.marked - found.total
    at_peak = {
        "parameters": _bytes([*model.parameters(), *model.buffers()]),
        "optimizer": 0 if optimizer is None else _bytes(tensors_in(list(optimizer.state.values()))),
        "subspaces": _bytes(subspaces_of(model)),
        "batch": _bytes(tensors_in(batch)),
        "step": step.peak,
    }
    return Breakdown(sum(at_peak.values()), "the step", at_peak, kept, found.by_module)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all their storages together."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())
