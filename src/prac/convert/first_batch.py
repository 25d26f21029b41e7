"""Where no example was given: the first batch that the model trains on shows its structure."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prac.convert.conversion import Conversion
from prac.convert.probe import Structure, Watch, probe
from prac.layers import Compressed
from prac.layers.base import is_transformed, refuse_pickle
from prac.runtime.fake import faked, is_fake
from prac.runtime.running import Example, as_call
from prac.runtime.under_way import UnderWay


def structure_of(
    model: nn.Module, names: Sequence[str], example: Example, *, is_made_up: bool = False
) -> Structure | None:
    """What ``example`` shows of ``model``: on a copy without numbers, or where it does not run so, on the model itself.

    A made-up example is small, and runs on the model itself at once. Where the model refuses it nothing is known: None.

    Raises:
        ValueError: if the model fails on an example that is not made up.
    """
    args, kwargs = as_call(example)
    if any(isinstance(p, FakeTensor) for p in model.parameters()):  # a copy without numbers already
        return probe(model, names, args, kwargs)
    has_numbers = not any(is_fake(p) for p in model.parameters())
    if not is_made_up or not has_numbers:
        try:
            with faked(model, args, kwargs) as (twin, *batch):
                found = probe(twin, names, *batch)
            if found.of_training or not has_numbers:
                return found
        except Exception as error:  # a stranger's forward, that asks for numbers, or for a kernel
            if not has_numbers:
                raise ValueError(_fails(model, error)) from error
    try:
        return probe(model, names, args, kwargs)
    except Exception as error:
        if is_made_up:
            return None
        raise ValueError(_fails(model, error)) from error


def _fails(model: nn.Module, error: Exception) -> str:
    return (
        f"this {type(model).__name__} fails on the example that prac.compress was given: "
        f"{type(error).__name__}: {str(error).rstrip('. ')}. Give one that the model trains on, "
        "or none: then the first batch shows what prac has to know."
    )


_lock = threading.Lock()


class FirstBatch:
    """A hook before the model's forward, until it has seen a batch to train on.

    It runs the batch on a copy without numbers before the model itself does. Where that fails, it watches the model
    instead, and the layers share what they can from the second batch on: the structure is that of training alone.
    """

    only_counts = True  # nobody would miss it

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self._seen: Structure | None = None
        self._watching: Callable[[], None] | None = None  # ends it

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses, as the layers do."""
        refuse_pickle("")

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstBatch:
        return FirstBatch(copy.deepcopy(self.conversion, memo))

    def attach(self, model: nn.Module) -> None:
        """Wait for a batch."""
        model.register_forward_pre_hook(self, with_kwargs=True)
        self.conversion.shared.is_waiting = True

    @torch.compiler.disable(reason="prac watches the first forward pass")  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the model's forward."""
        if not (model.training and torch.is_grad_enabled()) or is_transformed():
            return
        with _lock:  # of several threads the first looks, and the others find it done
            if self in model._forward_pre_hooks.values():
                self.close()
                self._look(model, args, kwargs)

    def _look(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        structure = self._seen or self._without_numbers(model, args, kwargs)
        self.conversion.shared.is_waiting = False
        if structure is None:
            self._watch(model, args, kwargs)
        else:
            detach(model)
            self.conversion.again(model, structure)

    def _without_numbers(self, model: nn.Module, args: Any, kwargs: Any) -> Structure | None:
        names = self.conversion.names(model)
        try:
            with faked(model, args, kwargs) as (twin, *batch):
                for layer in twin.modules():
                    if isinstance(layer, Compressed):
                        layer._prac.suspended = True
                found = probe(twin, names, *batch)
        except Exception:  # a stranger's forward, that asks for numbers, or for a kernel
            return None
        return found if found.of_training else None

    def _watch(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        watch = Watch(model, self.conversion.names(model), UnderWay(model))
        watch.__enter__()
        self.conversion.shared.is_watched = True

        def end() -> None:
            hook.remove()
            watch.__exit__()

        def leave(model: nn.Module, inputs: Any, output: Any) -> None:
            structure = None if output is None else watch.structure(output, args, kwargs)
            self.close()
            if structure is not None and structure.hidden:  # a block that is computed again has to find what it was
                self._seen = structure
            elif structure is not None:
                detach(model)
                self.conversion.again(model, structure)

        hook = model.register_forward_hook(leave, always_call=True)
        self._watching = end
        weakref.finalize(model, watch.abandon).atexit = False

    def close(self) -> None:
        """Stop watching, also where a call was interrupted so that its end never came."""
        end, self._watching = self._watching, None
        if end is not None:
            end()


def detach(model: nn.Module) -> None:
    """Take the hook away again, if there is one. By its class: a copied model has a copy of the hook."""
    hooks = model._forward_pre_hooks
    for key, hook in [(key, hook) for key, hook in hooks.items() if isinstance(hook, FirstBatch)]:
        hook.close()
        del hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
