"""What a forward looks at besides tensors and children counts at the call: configs, lists, globals, closures."""

from __future__ import annotations

import copy
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import agree
from models import FeedForward, N
from torch import Tensor, nn

import prac
from prac.layers import Compressed

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


@dataclass(slots=True)
class Slots:
    factor: float = 1.0


@dataclass
class Nested:
    inner: Any = field(default_factory=lambda: SimpleNamespace(factor=1.0))


class Times(FeedForward):
    """An MLP times a number that it finds somewhere."""

    at_class = 1.0

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self._private = 1.0
        vars(self).update(attributes)

    def factor(self) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor()


TABLE: dict[Any, float] = {}
NUMBER = 1.0


def helper() -> float:
    return NUMBER


def change_global(module: nn.Module, value: float) -> None:
    globals()["NUMBER"] = value


def setter(name: str, path: str = "") -> Callable[[Any, float], None]:
    def change(module: nn.Module, value: float) -> None:
        setattr(module.get_submodule("1") if not path else eval(f"m.{path}", {"m": module[1]}), name, value)

    return change


def change_in(path: str, key: Any) -> Callable[[Any, float], None]:
    def change(module: nn.Module, value: float) -> None:
        eval(f"m.{path}", {"m": module[1]})[key] = value

    return change


def closed() -> tuple[Callable[[Any], float], Callable[[Any, float], None]]:
    number = 1.0

    def factor(self: Any) -> float:
        return number

    def change(module: nn.Module, value: float) -> None:
        nonlocal number
        number = value

    return factor, change


def in_place(module: nn.Module, value: float) -> None:
    module[1].tensor.fill_(value)


CASES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any], Any], Callable[[Any, float], None]]] = {
    "private attribute": (dict, lambda m: m._private, setter("_private")),
    "attribute that shadows the class": (dict, lambda m: m.at_class, setter("at_class")),
    "attribute that was not there": (dict, lambda m: getattr(m, "later", 1.0), setter("later")),
    "config": (lambda: {"c": SimpleNamespace(factor=1.0)}, lambda m: m.c.factor, setter("factor", "c")),
    "arguments": (lambda: {"c": Namespace(factor=1.0)}, lambda m: m.c.factor, setter("factor", "c")),
    "slots": (lambda: {"c": Slots()}, lambda m: m.c.factor, setter("factor", "c")),
    "config in a config": (lambda: {"c": Nested()}, lambda m: m.c.inner.factor, setter("factor", "c.inner")),
    "list": (lambda: {"numbers": [1.0]}, lambda m: m.numbers[0], change_in("numbers", 0)),
    "dict in a list": (lambda: {"numbers": [{"a": 1.0}]}, lambda m: m.numbers[0]["a"], change_in("numbers[0]", "a")),
    "tensor": (lambda: {"tensor": torch.ones(())}, lambda m: m.tensor, in_place),
    "global": (dict, lambda m: NUMBER, change_global),
    "global of a function": (dict, lambda m: helper(), change_global),
    "global table": (dict, lambda m: TABLE.get("a", 1.0), lambda m, value: TABLE.update(a=value)),
    "closure": (dict, *closed()),
    "class": (dict, lambda m: type(m).at_class, lambda m, value: setattr(type(m[1]), "at_class", value)),
}


class Root(nn.Module):
    """A module that is no child of who looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 1.0


class Property:
    scale = 1.0

    def __init__(self) -> None:
        self._value = 1.0

    @property
    def value(self) -> float:
        return self._value

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._value

    def __getattr__(self, name: str) -> float:
        if name == "_table" or name not in self._table:
            raise AttributeError(name)
        return self._table[name]


def with_table() -> Property:
    found = Property()
    vars(found)["_table"] = {"far": 1.0}
    return found


DEEP: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any], Any], Callable[[Any, float], None]]] = {
    "module in a list": (lambda: {"ref": [Root()]}, lambda m: m.ref[0].alpha, setter("alpha", "ref[0]")),
    "class of a config": (
        lambda: {"c": Property()},
        lambda m: m.c.scale,
        lambda m, value: setattr(Property, "scale", value),
    ),
    "property of a config": (lambda: {"c": Property()}, lambda m: m.c.value, setter("_value", "c")),
    "what an object finds": (lambda: {"c": with_table()}, lambda m: m.c.far, change_in("c._table", "far")),
    "object that is called": (lambda: {"c": Property()}, lambda m: m.c(1.0), setter("_value", "c")),
    "global within a lambda": (dict, lambda m: (lambda: NUMBER)(), change_global),
    "global within a generator": (dict, lambda m: sum(NUMBER for _ in range(1)), change_global),
    "beside many others": (
        lambda: {"numbers": list(range(300)), "c": {"a": [1.0]}},
        lambda m: m.c["a"][0] + 0 * m.numbers[0],
        change_in("c['a']", 0),
    ),
    "weakly referred to": (
        lambda: {"c": ROOT_REF},
        lambda m: m.c().alpha,
        lambda m, value: setattr(ROOT, "alpha", value),
    ),
}
ROOT = Root()
ROOT_REF = weakref.ref(ROOT)
CASES |= DEEP


@pytest.mark.filterwarnings("ignore:.*keeps an input of its own")
@pytest.mark.parametrize("case", CASES)
def test_a_value_that_changes_later_counts(case: str) -> None:
    attributes, factor, change = CASES[case]
    of_class = type("Case", (Times,), {"factor": factor, "at_class": 1.0})
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), of_class(**attributes()), nn.Linear(N, 5)).train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, EXACT, include="*", example=X)

    def row() -> str:
        return {row.name: row for row in handle.rows()}["1"].note

    try:
        agree(model, plain, X)
        assert isinstance(model[1], Compressed) and not row()
        for each in (model, plain):
            change(each, 0.5)
        with pytest.warns(UserWarning, match="was changed"):
            agree(model, plain, X)
        assert "was changed" in row()
        for each in (model, plain):
            change(each, 1.0)
        agree(model, plain, X)
        assert not row() or case == "tensor"  # which counts its changes, not their values
    finally:
        TABLE.clear()
        change_global(model, 1.0)


def test_a_dropout_that_a_config_switches_on_later() -> None:
    class Feed(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.up, self.act, self.down, self.config = nn.Linear(N, 48), nn.GELU(), nn.Linear(48, N), config

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.act(self.up(x)), self.config.dropout, self.training))

    torch.manual_seed(0)
    config = SimpleNamespace(dropout=0.0)
    model = nn.Sequential(nn.LayerNorm(N), Feed(config), nn.LayerNorm(N), Feed(config)).train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, EXACT, include="*", example=X)
    agree(model, plain, X)
    config.dropout = plain[1].config.dropout = 0.5
    with pytest.warns(UserWarning, match=r"config.dropout was changed from 0.0 to 0.5"):
        agree(model, plain, X)
    assert sum("config.dropout" in row.note for row in handle.rows()) == 2
