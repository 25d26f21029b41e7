"""A compressed layer: the user's own module, with its class swapped for a subclass."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from prac.config import Kind
from prac.estimators.base import Estimator
from prac.estimators.clock import in_backward
from prac.layers.reach import picked
from prac.layers.record import Keeps, Match, Record
from prac.layers.swapping import without_prac
from prac.layers.way import Difference, way
from prac.runtime.autocast import autocast_dtype, without_autocast

TRANSFORMED = "it is called within a transform of torch.func, forward-mode AD or torch.jit.trace"
MOST_TRIES = 16  # of a layer; one whose attributes change again and again goes its own way


class Compressed(nn.Module):
    """Mixed into the class of a module, in front of it, by :func:`swap`.

    The module stays the same object with the same parameters, hooks, names and state_dict;
    only ``forward`` changes, and only for training steps: in eval mode, under ``no_grad``
    and where nothing needs a gradient, the original runs. So it does where the module is not any more what it was
    when it was compressed, or is called in another way; ``handle.summary()`` then says so.

    ``torch.compile`` leaves training steps of the layer out of its graphs: subspaces, clocks and random numbers live
    between calls, where a graph could not follow them. The layer's own kernels are compiled
    (:mod:`prac.runtime.kernel`), what lies between layers is compiled as ever, and so is everything in eval mode.
    """

    kind: ClassVar[Kind]
    statistics: ClassVar[int] = 0  # numbers per token kept exactly, beside Z
    in_full: ClassVar[str] = "it keeps its input in full"  # what goes its own way
    _prac: Record

    @property
    def estimators(self) -> dict[str, Estimator]:
        """One for each tensor the layer keeps."""
        return self._prac.estimators

    @estimators.setter
    def estimators(self, estimators: dict[str, Estimator]) -> None:
        self._prac.estimators = estimators

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, in training with what it keeps compressed."""
        if not isinstance(self, Compressed):  # restored, and called by a method that somebody took before
            return type(self).forward(self, *args, **kwargs)
        if self._prac.suspended or not torch.is_grad_enabled():
            return self._original(*args, **kwargs)
        # What is computed again in backward is as it was, whatever the mode is by then.
        if not self.training and not (self._prac.shared.trains and in_backward()):
            self._prac.shared.evaluates = True
            return self._original(*args, **kwargs)
        return self._outside_graphs(*args, **kwargs)

    def _outside_graphs(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`_in_training`; :func:`swap` hides it from torch.compile."""
        raise NotImplementedError

    def _in_training(self, *args: Any, **kwargs: Any) -> Any:
        record = self._prac
        if is_transformed():
            return self._in_its_own_way(TRANSFORMED, args, kwargs)
        if len(args) == 1 and not kwargs:
            (x,) = args
        else:
            x = _only_input(record, args, kwargs)
        if x is None:
            return self._in_its_own_way("it is called with more than its input", args, kwargs)
        if isinstance(x, Tensor) and x.is_complex():
            return self._in_its_own_way("its input is complex", args, kwargs)
        if changed := self.differs(x.device if isinstance(x, Tensor) else None):
            return self._in_its_own_way(changed, args, kwargs)
        if not isinstance(x, Tensor) or not x.numel():  # nothing to keep
            return self._original(*args, **kwargs)
        _refuse_others(record.name, x)
        record.begin(x.dtype if self.kind == "norm" else autocast_dtype(x))
        if record.shared.is_waiting:
            record.shared.is_waiting = False
            record.shared.warn(
                "prac has not seen a batch yet: the module that prac.compress was given is not called itself. So every "
                "layer keeps an input of its own, and attention is left in full; give prac.compress an example."
            )
        if not hasattr(self, "parametrizations"):
            return self._compressed(x)
        with parametrize.cached():  # evaluated once a call, as in the original: some change themselves by it
            return self._compressed(x)

    def _compressed(self, x: Tensor) -> Any:
        """What the layer does in training."""
        raise NotImplementedError

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before."""
        return super().forward(*args, **kwargs)

    def _idle(self, x: Tensor) -> Any:
        """The original's output, where backward does not come by."""
        self.keep_nothing()
        return self._original(x)

    def _in_its_own_way(self, why: str, args: Any, kwargs: Any) -> Any:
        self.depart(f"{why}: {self.in_full}", "in full")
        return self._original(*args, **kwargs)

    def differs(self, device: torch.device | None = None) -> str:
        """In what the module is not any more what it was when it was compressed, or "".

        What it calls may be anybody's, and is honoured. A number that its forward may or may not look at (in a config,
        say) is another matter: then the module is tried again, and only counts where what it computes is not the same.
        It is tried on ``device`` if it has no parameters.
        """
        record, found = self._prac, list(self._differences())
        if not found:
            return ""
        if called := next((text for text, is_called in found if is_called), ""):
            return called
        texts = tuple(text for text, _ in found)
        if texts != record.refused and (record.tries >= MOST_TRIES or not self._computes_the_same(device)):
            record.refused = texts
        if texts != record.refused:
            return ""
        why = f" (after {MOST_TRIES} changes it is not tried again)" if record.tries >= MOST_TRIES else ""
        return f"{texts[0]}{why}"

    def _differences(self) -> Iterator[Difference]:
        """All of them; also what a class that somebody put in front has in place of what the original names."""
        way = self._prac.way
        yield from way.differences(self, self._prac.original)
        made = vars(self)["_modules"].get("parametrizations", ())
        for each in type(self).__mro__:
            if "_outside_graphs" in vars(each):
                return
            for name in picked(vars(each), way.words).keys() - {"forward"}:
                if not name.startswith("__") and name not in made:
                    yield Difference(f"its {name} was changed", True)

    def _computes_the_same(self, device: torch.device | None) -> bool:
        """Whether it is recognised as what it was; if so that is what later changes are from."""
        from prac.layers import recognise  # which knows every kind, and so this file

        record = self._prac
        record.tries += 1
        with without_autocast("cpu" if device is None else device.type):
            found = recognise(without_prac(self), device)
        if not isinstance(found, Match) or _formula(found) != _formula(record.match):
            return False
        record.match = dataclasses.replace(record.match, facts=found.facts)
        record.way, record.dtypes = way(self, record.original), {}
        return True

    def keep_nothing(self) -> None:
        """Note that in this call there is nothing to keep."""
        self.depart("nothing that it reads needs a gradient: it keeps nothing", "nothing", warn=False)

    def depart(self, why: str, keeps: Keeps, *, warn: bool = True) -> None:
        """Note why this call is not as planned, and what it keeps instead; with one warning for a model."""
        record = self._prac
        record.keeps = keeps
        if record.departs == why:
            return
        record.departs = why
        if not warn:
            return
        record.shared.warn(
            f"{why} (a {record.original.__name__} that prac compressed; handle.summary() shows where else).",
            record.name,
            why.partition(":")[0].partition(" from ")[0],  # whatever the values are and stays in full
        )

    def extra_repr(self) -> str:
        """The original's, and how the input is kept."""
        labels = {e.label() for e in self.estimators.values() if e.width is not None}
        return ", ".join(filter(None, [super().extra_repr(), *(f"kept={label}" for label in sorted(labels))]))

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses, when torch.jit.script asks: it would compile the layer's class, which is made at run time."""
        raise TypeError(
            f"{self._prac.name or 'the model'} is compressed by prac, and torch.jit.script cannot compile it. Call "
            "handle.restore() first."
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses: a compressed class is made at run time, so a pickle could not find it."""
        refuse_pickle(self._prac.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As of any module, with subspaces, draws and steps of its own from then on."""
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            return own(memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin


def _only_input(record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument, if all others are what the forward has by default; else None."""
    try:
        bound = inspect.signature(record.way.forward).bind(None, *args, **kwargs)
    except TypeError:
        return None  # the original says what is wrong
    given, defaults = bound.arguments, bound.signature.parameters
    x = given.get(record.parameter)
    others = [name for name in list(given)[1:] if name != record.parameter]
    return x if all(given[name] is defaults[name].default for name in others) else None


def _refuse_others(name: str, x: Tensor) -> None:
    """Raise for tensors that have no rows of features to compress."""
    distributed = sys.modules.get("torch.distributed.tensor")
    is_distributed = distributed is not None and isinstance(x, distributed.DTensor)
    if x.is_nested or is_distributed or x.layout != torch.strided:
        what = "a DTensor" if is_distributed else "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise TypeError(
            f"{name}: its input is {what}, which prac cannot compress. Leave the layer out: "
            f"prac.compress(model, exclude={name!r})."
        )


def refuse_pickle(name: str) -> NoReturn:
    """Say what to do instead.

    Raises:
        TypeError: always.
    """
    raise TypeError(
        f"{name or 'the model'} is compressed by prac and cannot be pickled whole (torch.save(model), "
        "multiprocessing's spawn). Save model.state_dict(), and handle.state_dict() beside it; or call "
        "handle.restore() first and prac.compress again afterwards."
    )


def is_transformed() -> bool:
    """Whether something is at work that prac's ops do not know: torch.func (vmap, jvp, …), forward-mode AD, tracing."""
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def trained(*tensors: Tensor | None) -> bool:
    """Whether any of them needs a gradient."""
    return any(t is not None and t.requires_grad for t in tensors)


def _formula(match: Match) -> Any:
    return getattr(match.facts, "roles", match.facts)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked on to the module, or to all, and would miss a call that is made without it."""
    return has_hooks(module) or _has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of its own, but for those that only count."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(not getattr(hook, "only_counts", False) for table in hooks for hook in table.values())


def overrides_forward(module: nn.Module) -> bool:
    """Whether this one instance has a forward of its own, which would bypass its class's."""
    return "forward" in vars(module)
