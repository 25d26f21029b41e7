"""How a module computes, beside its tensors and children: noted when it is found, and compared at every call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from prac.layers.reach import GONE, OWN, Reached, Words, attributes, contents_of, held, is_held, is_same, named
from prac.layers.reach import reached as everything


class Difference(NamedTuple):
    """Between what a module is and what it was."""

    text: str
    is_called: bool  # something was replaced that its forward calls, or that is its forward


class Way(NamedTuple):
    """What decides, beside its tensors and children, what a module computes."""

    of_class: type[nn.Module]
    forward: Any  # of its class
    words: Words
    own: dict[str, Any]  # its attributes, held
    known: set[str]  # names of other attributes, which say nothing
    parts: frozenset[str]  # names of the parameters, buffers and children that it has
    reached: tuple[Reached, ...]
    is_copied: bool = False  # with the model, after which everything it refers to may be another

    def is_replaced(self, of_class: type[nn.Module]) -> bool:
        """Whether the forward of its class is another."""
        return of_class.forward is not self.forward

    def differences(self, module: nn.Module, of_class: type[nn.Module]) -> Iterator[Difference]:
        """What is not as it was."""
        if self.is_replaced(of_class):
            yield Difference("the forward of its class was replaced", True)
        if of_class is not self.of_class:
            yield Difference("its class was changed", False)
        if self.is_copied:
            yield Difference("it was copied", False)
            return
        now = vars(module)
        for name, note in self.own.items():
            if not is_held(note, found := now.get(name, GONE)):
                yield _difference(name, note, found)
        if not now.keys() <= self.known:
            yield from self._new(module, of_class)
        parts = _parts(module)
        for name in parts ^ self.parts if parts != self.parts else ():
            if name not in now:  # a replica has its parameters as attributes
                yield Difference(f"its {name} was changed", False)
        for each in self.reached:
            if not is_same(each.before, found := contents_of(each, self.words)):
                yield _within(each, found)

    def _new(self, module: nn.Module, of_class: type[nn.Module]) -> Iterator[Difference]:
        """Attributes that were not there."""
        now = vars(module)
        for name in now.keys() - self.known:
            if name in self.words if self.words is not None else name[0] != "_" or hasattr(of_class, name):
                yield _difference(name, getattr(of_class, name, GONE), now[name])
            else:
                self.known.add(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Way:
        return self._replace(own={}, reached=(), known=set(), is_copied=True)


def way(module: nn.Module, of_class: type[nn.Module] | None = None) -> Way:
    """The module's way of computing, to be compared with a later one; ``of_class`` if it has another for a while."""
    of_class = of_class or type(module)
    words = named(module, of_class)
    own = {name: held(value) for name, value in attributes(module, words).items()}
    known = {*OWN, *vars(module), *module._parameters, *module._buffers}
    around = tuple(everything(module, of_class, words))
    return Way(of_class, of_class.forward, words, own, known, _parts(module), around)


def of_forward(of_class: type[nn.Module]) -> Way:
    """Of modules of which only the forward counts."""
    return Way(of_class, of_class.forward, None, {}, set(), frozenset(), ())


def _parts(module: nn.Module) -> frozenset[str]:
    """Names of the parameters, buffers and children that it has."""
    tables = (module._parameters, module._buffers, module._modules)
    there = {n for table in tables for n, value in table.items() if value is not None}
    made = module._modules.get("parametrizations")
    if made is not None:
        there = (there - {"parametrizations"}) | made._modules.keys()
    return frozenset(there)


def _difference(name: str, before: Any, now: Any) -> Difference:
    before, now = ("nothing" if each is GONE else each for each in (before, now))
    plain = all(each is None or isinstance(each, bool | int | float | str) for each in (before, now))
    is_called = any(callable(each) and not isinstance(each, type | weakref.ref) for each in (before, now))
    values = f" from {before} to {now}" if plain else ""
    return Difference(f"its {name} was changed{values}", is_called)


def _within(reached: Reached, now: Any) -> Difference:
    """The difference in what is in a thing."""
    path, before = reached.path, reached.before
    if not hasattr(before, "get") or not hasattr(now, "keys"):
        return Difference(f"its {path} was changed", False)
    there = before if isinstance(before, dict) else before.keys or []
    names = [n for n in dict.fromkeys([*there, *now]) if not is_held(before.get(n, GONE), now.get(n, GONE))]
    name = names[0] if names else ""
    return _difference(f"{path}.{name}", before.get(name, GONE), now.get(name, GONE))
