"""How a module computes, beside its tensors and children: noted when it is found, and compared at every call.

What a forward can look at: attributes of the module and of its class, the globals and closures of its functions, and
what is in the objects, lists and dicts that those refer to (a config). Each of these is noted with a copy of its
contents. Of attributes those count that the code names; where it finds them in another way (``getattr``), all do.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

MOST = 256  # things that are looked at, the nearest first; what a module refers to may be a whole program
OWN = frozenset(vars(nn.Module())) | {"_prac"}  # attributes that every module has
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}  # what is in their objects is their own business
_FINDS = {"getattr", "vars", "__dict__", "eval", "exec"}  # with these, code reads attributes that it does not name
_GONE = object()  # in place of what is not there


class Difference(NamedTuple):
    """Between what a module is and what it was."""

    text: str
    is_called: bool  # something was replaced that its forward calls, or that is its forward


class Reached(NamedTuple):
    """A thing that a module's forward can look at, with a copy of what was in it."""

    path: str
    thing: Any
    before: Any
    is_around: bool  # by way of a function or the class, not of the module's own attributes


class Way(NamedTuple):
    """What decides, beside its tensors and children, what a module computes."""

    forward: Any  # of its class
    names: frozenset[str] | None  # what its code names; None where that does not tell what it reads
    own: dict[str, Any]  # its attributes
    known: set[str]  # names of other attributes, which say nothing
    reached: tuple[Reached, ...]
    is_copied: bool = False  # with the model, after which everything it refers to may be another

    def is_replaced(self, of_class: type[nn.Module]) -> bool:
        """Whether the forward of its class is another."""
        return of_class.forward is not self.forward

    def differences(self, module: nn.Module, of_class: type[nn.Module]) -> Iterator[Difference]:
        """What is not as it was."""
        if self.is_replaced(of_class):
            yield Difference("the forward of its class was replaced", True)
        if self.is_copied:
            yield Difference("it was copied", False)
            return
        now = vars(module)
        for name, value in self.own.items():
            if (found := now.get(name, _GONE)) is not value and not _equal(found, value):
                yield _difference(name, value, found)
        if not now.keys() <= self.known:
            for name in now.keys() - self.known - self.own.keys():
                if name in self.names if self.names is not None else name[0] != "_" or hasattr(of_class, name):
                    yield _difference(name, getattr(of_class, name, _GONE), now[name])
                else:
                    self.known.add(name)
        for path, thing, before, _ in self.reached:
            if not _equal(found := _contents(thing, self.names), before):
                yield _within(path, before, found)

    @property
    def looks_around(self) -> bool:
        """Whether its functions look at lists, dicts or objects that are not the module's own."""
        return any(each.is_around and not isinstance(each.thing, FunctionType | type) for each in self.reached)

    def __deepcopy__(self, memo: dict[int, Any]) -> Way:
        return self._replace(own={}, reached=(), known=set(), is_copied=True)


def way(module: nn.Module, of_class: type[nn.Module] | None = None) -> Way:
    """The module's way of computing, to be compared with a later one; ``of_class`` if it has another for a while."""
    of_class = of_class or type(module)
    attributes = {name: value for name, value in vars(module).items() if name not in OWN}
    names = _named(of_class, attributes)
    own = {name: value for name, value in attributes.items() if names is None or name in names}
    known = {*OWN, *attributes, *module._parameters, *module._buffers}
    return Way(of_class.forward, names, own, known, tuple(_reached(own, of_class, names)))


def _named(of_class: type[nn.Module], attributes: dict[str, Any]) -> frozenset[str] | None:
    """What the code of a module names, that of torch's classes included."""
    classes = of_class.__mro__[: of_class.__mro__.index(nn.Module)]
    todo = [value for each in classes for _, value in _members(each)]
    todo += [each.thing for each in _reached(attributes, of_class, None)]
    found, seen = set[str](), set[int]()
    while todo:
        function = todo.pop()
        if isinstance(function, FunctionType) and id(function) not in seen:
            seen.add(id(function))
            found.update(_names_in(function.__code__))
            todo += [value for _, value in _around(function)]  # what a decorator wrapped
    is_told = isinstance(of_class.forward, FunctionType) and not found & _FINDS
    return frozenset(found) if is_told else None


def _names_in(code: CodeType) -> Iterator[str]:
    """The names and words of a function, of those inside it too."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, str):
            yield each
        elif isinstance(each, CodeType):
            yield from _names_in(each)


def _reached(own: dict[str, Any], of_class: type[nn.Module], names: frozenset[str] | None) -> Iterator[Reached]:
    classes = [each for each in of_class.__mro__ if not _is_of_library(each)]
    todo = deque((*item, False) for item in own.items())
    todo += [("class", each, True) for each in classes]
    seen = set[int]()
    while todo and len(seen) < MOST:
        path, thing, is_around = todo.popleft()
        if id(thing) in seen or isinstance(thing, nn.Module | ModuleType):
            continue
        seen.add(id(thing))
        is_code = isinstance(thing, FunctionType | type)
        if is_code and thing not in classes and _is_of_library(thing, "transformers"):
            continue
        todo += [(name, each, is_around or is_code) for name, each in _inner(path, thing, names)]
        contents = _contents(thing, names)
        if contents is not None and (contents or not isinstance(thing, FunctionType)):
            yield Reached(path, thing, _copied(contents), is_around)


def _members(of_class: type) -> list[tuple[str, Any]]:
    """Of a class, its methods among them; what a call never runs (``__init__``) is left out."""
    named = [(n, v) for n, v in vars(of_class).items() if n == "__call__" or not n.startswith("__")]
    return [(name, getattr(value, "__func__", None) or getattr(value, "fget", None) or value) for name, value in named]


def _inner(path: str, thing: Any, names: frozenset[str] | None) -> list[tuple[str, Any]]:
    """What a thing refers to, with how to get there."""
    if isinstance(thing, functools.partial):
        return [(path, thing.func), (path, thing.args), (path, thing.keywords)]
    if isinstance(thing, MethodType):
        return [(path, thing.__func__), (path, thing.__self__)]
    if isinstance(thing, type):
        return _members(thing)
    if isinstance(thing, FunctionType):
        return list(_used(thing).items())
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return [(path, each) for each in thing]
    if isinstance(thing, dict):
        return [(path, each) for each in (*thing.keys(), *thing.values())]
    contents = _contents(thing, names)
    return [(f"{path}.{name}", each) for name, each in contents.items()] if isinstance(contents, dict) else []


def _contents(thing: Any, names: frozenset[str] | None) -> Any:
    """What of a thing can change while it stays the same thing; None where nothing can, or it is not looked at.

    Of an object, the attributes with one of the names.
    """
    if isinstance(thing, dict | list | set | deque):
        return thing
    if isinstance(thing, type):
        return vars(thing)
    if isinstance(thing, Tensor):
        return version(thing)
    if isinstance(thing, FunctionType):
        return _used(thing)
    of_class: type = type(thing)
    if not _is_looked_at(of_class):
        return None
    own = getattr(thing, "__dict__", {})
    if slots := _slots(of_class):
        own = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | own
    return own if names is None else {name: own[name] for name in names if name in own}


@functools.cache
def _is_looked_at(of_class: type) -> bool:
    """Whether it is an object of somebody's; numbers, strings and tuples are not."""
    return issubclass(of_class, SimpleNamespace | Namespace) or not _is_of_library(of_class)


@functools.cache
def _slots(of_class: type) -> list[str]:
    found = [vars(each).get("__slots__", ()) for each in of_class.__mro__]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


def version(tensor: Tensor) -> int | None:
    """Counts the changes in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _used(function: FunctionType) -> dict[str, Any]:
    """The globals and the variables around it that a function may read, its defaults, and what it names of modules."""
    code, known = function.__code__, function.__globals__
    used = {name: known[name] for name in code.co_names if name in known}
    for name, value in list(used.items()):
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES | {"transformers"}:
            used |= {f"{name}.{n}": vars(value)[n] for n in code.co_names if n in vars(value)}
    used |= dict(_around(function))
    if function.__defaults__ or function.__kwdefaults__:
        used["defaults"] = (function.__defaults__, tuple((function.__kwdefaults__ or {}).values()))
    return used


def _around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables around a function that it reads."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not set yet
            yield name, _GONE


def _is_of_library(thing: Any, *others: str) -> bool:
    root = str(getattr(thing, "__module__", "")).partition(".")[0]
    return root in _LIBRARIES or root in others


def _copied(contents: Any) -> Any:
    if isinstance(contents, int):
        return contents
    return contents.copy() if isinstance(contents, list | set | deque) else dict(contents)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:  # tensors and arrays inside, which answer with as many truths as they have numbers
        return False


def _difference(name: str, before: Any, now: Any) -> Difference:
    before, now = ("nothing" if each is _GONE else each for each in (before, now))
    plain = all(each is None or isinstance(each, bool | int | float | str) for each in (before, now))
    is_called = any(callable(each) and not isinstance(each, type) for each in (before, now))
    values = f" from {before} to {now}" if plain else ""
    return Difference(f"its {name} was changed{values}", is_called)


def _within(path: str, before: Any, now: Any) -> Difference:
    """The difference in what is in a thing."""
    if not isinstance(before, dict) or not hasattr(now, "keys"):
        return Difference(f"its {path} was changed", False)
    names = [name for name in {**before, **now} if not _equal(before.get(name, _GONE), now.get(name, _GONE))]
    name = names[0] if names else ""
    return _difference(f"{path}.{name}", before.get(name, _GONE), now.get(name, _GONE))
