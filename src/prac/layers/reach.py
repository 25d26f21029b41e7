"""What the code of a module can look at: attributes, globals, closures, and what is in the things that those refer to.

Found from the forward on: what it names, what the functions that it names name, and so on. Of objects, classes and
packages only what is named counts; lists and dicts count whole. Where code finds attributes in another way
(``getattr``), all of them do.
"""

from __future__ import annotations

import functools
import sys
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from prac.runtime.quiet import version

Words = frozenset[str] | None  # what code names; None where that does not tell what it reads

MOST = 256  # things that are looked at, the nearest first; what a module refers to may be a whole program
OWN = frozenset(vars(nn.Module())) | {"_prac"}  # attributes that every module has
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}  # what is in their objects is their own business
GONE = object()  # in place of what is not there
_FINDS = {"getattr", "vars", "__dict__", "eval", "exec"}  # with these, code reads attributes that it does not name
_NOT_RUN = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__repr__", "__eq__", "__setattr__"}
_PLAIN = bool | int | float | complex | str | bytes | None
_SMALL = 16  # numbers of a tensor on the CPU that are compared themselves


class Reached(NamedTuple):
    """A thing that code can look at, with a copy of what was in it."""

    path: str
    thing: Any  # :func:`held`
    before: Any
    is_around: bool  # by way of a function or the class, not of the module's own attributes


def held(value: Any) -> Any:
    """The value as it may be noted: tensors and modules without keeping them alive."""
    return weakref.ref(value) if isinstance(value, Tensor | nn.Module) else value


def is_held(note: Any, value: Any) -> bool:
    """Whether this is the value that was noted, or an equal one."""
    if isinstance(note, weakref.ref) and not isinstance(value, weakref.ref):
        return value is not None and note() is value  # of one that is gone the reference gives None
    if note is value:
        return True
    if isinstance(value, Tensor):
        return False
    try:
        return bool(note == value)
    except Exception:  # tensors and arrays inside, which answer with as many truths as they have numbers
        return False


def is_same(before: Any, now: Any) -> bool:
    """Whether these are the same contents."""
    if type(before) is not _Held:
        return is_held(before, now)
    keys, notes = before
    there = list(now) if keys is not None else None
    values = list(now.values()) if keys is not None else list(now)
    return keys == there and len(notes) == len(values) and all(map(is_held, notes, values))


class _Held(NamedTuple):
    """Contents with tensors or modules in them."""

    keys: list[Any] | None
    notes: list[Any]

    def get(self, name: Any, default: Any) -> Any:
        """What was noted of a key."""
        return dict(zip(self.keys or [], self.notes, strict=False)).get(name, default)


def named(module: nn.Module, of_class: type[nn.Module]) -> Words:
    """What the code of a module names."""
    forward = of_class.forward
    words: frozenset[str] = frozenset({"forward"})
    while True:
        functions = [forward, *(each.thing for each in reached(module, of_class, words))]
        found = {word for f in functions if isinstance(f, FunctionType) for word in _words(f.__code__)} | words
        if found == words:
            return None if words & _FINDS or not isinstance(forward, FunctionType) else words
        words = frozenset(found)


def reached(module: nn.Module, of_class: type[nn.Module], words: Words) -> Iterator[Reached]:
    """What code with these words can look at."""
    classes = list(of_class.__mro__[: of_class.__mro__.index(nn.Module)])
    own = attributes(module, words) | picked(
        {n: child for n, child in module._modules.items() if child is not None}, words
    )
    todo = deque((name, value, False) for name, value in own.items())
    todo += [("class", each, True) for each in classes]
    seen, children = {id(module)}, {id(child) for child in module._modules.values()}
    while todo and len(seen) < MOST:
        path, thing, is_around = todo.popleft()
        if isinstance(thing, weakref.ref):
            thing = thing()
        if isinstance(thing, _PLAIN) or id(thing) in seen:
            continue
        seen.add(id(thing))
        contents, is_code = _contents(thing, words), isinstance(thing, FunctionType | type)
        if id(thing) in children:  # what they compute is their own business
            inner = [(f"{path}.{name}", each) for name, each in contents.items()]
        else:
            inner = _inner(path, thing, contents, words)
        for name, each in inner:
            if thing in classes or not _is_foreign(each):
                todo.append((name, each, is_around or is_code))
        if contents is not None:
            yield Reached(path, held(thing), _noted(contents), is_around)


def contents_of(reached: Reached, words: Words) -> Any:
    """What is in it now; GONE if it is not alive any more."""
    thing = reached.thing
    if isinstance(thing, weakref.ref):
        thing = thing()
        if thing is None:
            return GONE
    return _contents(thing, words)


def attributes(module: nn.Module, words: Words = None) -> dict[str, Any]:
    """Those that not every module has, and that are named."""
    own = vars(module)
    return {name: own[name] for name in (own if words is None else words) if name in own and name not in OWN}


def picked(values: Mapping[str, Any], words: Words) -> dict[str, Any]:
    """Those that are named."""
    return dict(values) if words is None else {name: values[name] for name in words if name in values}


def _is_foreign(thing: Any) -> bool:
    """Code of a library."""
    return isinstance(thing, FunctionType | type) and is_of_library(thing, "transformers")


def is_of_library(thing: Any, *others: str) -> bool:
    """Whether code or a class is of a library that nobody changes."""
    root = str(getattr(thing, "__module__", "") or getattr(thing, "__name__", "")).partition(".")[0]
    return root in LIBRARIES or root in others


def _contents(thing: Any, words: Words) -> Any:
    """What of a thing can change while it stays the same thing; None where nothing can, or it is not looked at."""
    if isinstance(thing, dict | list | set | deque):
        return thing
    if isinstance(thing, Tensor):
        return counted(thing)
    if isinstance(thing, FunctionType):
        return {} if is_of_library(thing) else _used(thing)
    if isinstance(thing, type):
        return picked(vars(thing), words)
    if isinstance(thing, nn.Module):
        return attributes(thing, words)
    if isinstance(thing, ModuleType):
        return None if thing.__name__.partition(".")[0] in LIBRARIES or words is None else picked(vars(thing), words)
    of_class: type = type(thing)
    if of_class.__name__ == "ndarray":
        return thing.tobytes() if thing.nbytes <= 8 * _SMALL else None
    if not _is_looked_at(of_class):
        return None
    own = getattr(thing, "__dict__", {})
    if slots := _slots(of_class):
        own = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | own
    return picked(own, words)


def counted(tensor: Tensor) -> Any:
    """What tells of its changes in place: their number, and where they are few its numbers too."""
    is_small = tensor.device.type == "cpu" and tensor.numel() <= _SMALL and type(tensor) is Tensor
    return (version(tensor), tensor.tolist()) if is_small else version(tensor)


def _inner(path: str, thing: Any, contents: Any, words: Words) -> list[tuple[str, Any]]:
    """What a thing refers to, with how to get there."""
    if isinstance(thing, functools.partial):
        return [(path, thing.func), (path, thing.args), (path, thing.keywords)]
    if isinstance(thing, MethodType):
        return [(path, thing.__func__), (path, thing.__self__)]
    if isinstance(thing, type):
        return _members(thing, words)
    if isinstance(thing, FunctionType):
        return list(_used(thing).items())
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return [(path, each) for each in thing]
    if isinstance(thing, dict):
        return [(path, each) for each in (*thing.keys(), *thing.values())]
    if not isinstance(contents, dict):
        return []
    classes = [] if isinstance(thing, ModuleType) else [(path, each) for each in _class_of(thing).__mro__]
    return [*((f"{path}.{name}", each) for name, each in contents.items()), *classes]


def _class_of(thing: Any) -> type:
    """Its class; of a compressed module the original's."""
    record = vars(thing).get("_prac") if isinstance(thing, nn.Module) else None
    return type(thing) if record is None else record.original


def _members(of_class: type, words: Words) -> list[tuple[str, Any]]:
    """What of a class code may run or read."""
    members = []
    for name, value in vars(of_class).items():
        is_run = words is None or name in words or name.startswith("__")
        if is_run and name not in _NOT_RUN:
            members.append((name, getattr(value, "__func__", None) or getattr(value, "fget", None) or value))
    return members


@functools.cache
def _is_looked_at(of_class: type) -> bool:
    """Whether it is an object of somebody's; tuples are not."""
    return issubclass(of_class, SimpleNamespace | Namespace) or not is_of_library(of_class)


@functools.cache
def _slots(of_class: type) -> list[str]:
    found = [vars(each).get("__slots__", ()) for each in of_class.__mro__]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


@functools.cache
def _words(code: CodeType) -> frozenset[str]:
    """The names and words of a function, of those inside it too."""
    inside = [word for each in code.co_consts if isinstance(each, CodeType) for word in _words(each)]
    return frozenset([*code.co_names, *inside, *(each for each in code.co_consts if isinstance(each, str))])


def _used(function: FunctionType) -> dict[str, Any]:
    """The globals and the variables around it that a function may read, and its defaults."""
    known = function.__globals__
    used = {name: known[name] for name in _words(function.__code__) if name in known}
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
            yield name, GONE


def _noted(contents: Any) -> Any:
    """A copy, to be compared with later contents."""
    if isinstance(contents, set):
        return contents.copy()
    if isinstance(contents, list | deque):
        notes = [held(value) for value in contents]
        return _Held(None, notes) if any(map(_is_ref, notes)) else contents.copy()
    if isinstance(contents, dict):
        notes = [held(value) for value in contents.values()]
        return _Held(list(contents), notes) if any(map(_is_ref, notes)) else dict(dict.items(contents))
    return contents


def _is_ref(note: Any) -> bool:
    return isinstance(note, weakref.ref)
