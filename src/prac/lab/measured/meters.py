"""What one step of a block costs: bytes kept, bytes at the peak, floating-point operations.

A step is a forward pass and the backward pass from a given gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from prac.convert.handle import Handle
from prac.memory import track_kept
from prac.memory.allocator import allocated

aten = torch.ops.aten
# torch has none for products in place, nor for attention on CPU. Like those for CUDA, the latter count a causal mask
# as if it were full.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear(block: nn.Module, x: Tensor) -> None:
    """Free the gradients of a step."""
    block.zero_grad(set_to_none=True)
    x.grad = None


# --- bytes kept ------------------------------------------------------------------------------


def kept_bytes(block: nn.Module, x: Tensor, cached: Collection[OpOverload] = ()) -> int:
    """Bytes that one forward pass keeps for backward, each storage once, parameters and ``x`` not counted.

    Args:
        block: called on ``x``.
        x: the input.
        cached: operations whose outputs are kept behind autograd's back: selective checkpointing puts them into a
            cache of its own, which hooks on saved tensors never see.
    """
    outputs = _Outputs(cached)
    # A mode changes how compiled code runs, so none is entered without need.
    with outputs if cached else nullcontext(), track_kept(block) as kept:
        block(x)
    return kept.total + sum(tensor.untyped_storage().nbytes() for tensor in outputs.found.values())


class _Outputs(TorchDispatchMode):
    """Collects the outputs of some operations, one tensor for each storage."""

    def __init__(self, wanted: Collection[OpOverload]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted = frozenset(wanted)
        self.found: dict[int, Tensor] = {}  # held, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.wanted:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return out


# --- bytes at the peak -------------------------------------------------------------------------


class StepBytes(NamedTuple):
    """Bytes allocated above what was there before the step.

    ``held``: when the forward pass was over, without its output. ``peak``: at the highest point of the step, which
    includes the gradients of all parameters as far as they were there.
    """

    held: int
    peak: int


def allocated_bytes(block: nn.Module, x: Tensor, dy: Tensor) -> StepBytes:
    """What one step allocates, as torch's own allocator of the device sees it.

    That includes compiled code and tensors made inside operators, but not what a library takes from the system by
    itself (oneDNN's scratch space, say).
    """
    clear(block, x)
    with allocated(x.device) as found:
        y = block(x)
        found.mark()
        y.backward(dy)
    return StepBytes(found.marked - y.untyped_storage().nbytes(), found.peak)


# --- operations ----------------------------------------------------------------------------------


def until_refresh(handle: Handle) -> None:
    """Count optimizer steps up to the one in which every subspace is due, T1 later."""
    assert handle.config.T1 is not None
    later = handle.step + handle.config.T1
    while handle.step < later:
        handle.tick()


def step_flops(block: nn.Module, x: Tensor, dy: Tensor) -> int:
    """Floating-point operations of the matrix products and attention of one step; element-wise work counts nothing."""
    clear(block, x)
    with _Flops(x.device) as counter:
        block(x).backward(dy)
    return counter.total


class _Flops(TorchDispatchMode):
    """``torch.utils.flop_counter``'s formulas, also inside compiled code and inside the operators of prac.

    ``FlopCounterMode`` makes ``torch.compile`` fall back to eager, and takes a custom operator for one that does no
    work. Compiled code calls the same matrix products and attention through the dispatcher, so it only has to be let
    run: that is what an "infra" mode does.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}[device.type]
        self._kernels = torch._C.DispatchKeySet(key)

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # count what it is made of
                if func.namespace == "prac":
                    return func.redispatch(self._kernels, *args, **kwargs)
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
