"""What a forward looks at besides tensors and children counts at the call: configs, lists, globals, closures."""

from __future__ import annotations

import copy
import functools
import warnings
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
from models import BATCH, FeedForward, N, build
from torch import Tensor, nn

import prac
from prac.layers import Compressed
from prac.layers.alike import signature

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


def test_what_changes_without_effect_costs_nothing() -> None:
    """Settings of the whole model are in the config that every MLP refers to."""
    model = build("llama")
    handle = prac.compress(model, EXACT)
    model(**BATCH).loss.backward()
    before = handle.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.config.use_cache, model.config.note = False, {"added": 1}
        for module in model.modules():
            module.name_of_mine = "a name"
        model(**BATCH).loss.backward()
    assert handle.summary() == before
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(**BATCH).loss.backward()
    twins = [module._prac for module in twin.modules() if isinstance(module, Compressed)]
    assert twins and not any(record.departs for record in twins)
    with pytest.warns(UserWarning, match="was changed"):
        twin.model.layers[0].mlp.act_fn = nn.ReLU()
        twin(**BATCH).loss.backward()


def test_what_hooks_leave_on_a_module_is_neither_looked_at_nor_held() -> None:
    model = nn.Sequential(nn.RMSNorm(N), FeedForward(), nn.LayerNorm(N), FeedForward()).train()
    for module in model:
        module.register_forward_hook(lambda module, args, output: setattr(module, "captured", output.detach()))
    prac.compress(model, EXACT, include="*", example=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(X).sum().backward()
    refs = [weakref.ref(module.captured) for module in model]
    for module in model:
        del module.captured
    assert not any(ref() is not None for ref in refs)


@pytest.mark.filterwarnings("ignore:.*does not do as planned")
def test_code_that_names_no_attributes_is_watched_in_all_of_them() -> None:
    class Finds(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            self.scale_1 = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * getattr(self, f"scale_{1}")

    def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def wrapper(self: Any, x: Tensor) -> Tensor:
            return forward(self, x)

        return wrapper

    class Wrapped(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            self.scale_1 = 1.0

        @decorated
        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.silu(self.w1(x)) * self.w3(x)) * self.scale_1

    for of_class in (Finds, Wrapped):
        torch.manual_seed(0)
        model = nn.Sequential(nn.RMSNorm(N), of_class()).train()
        plain = copy.deepcopy(model)
        prac.compress(model, EXACT, include="*", example=X)
        assert isinstance(model[1], Compressed)
        model[1].scale_1 = plain[1].scale_1 = 0.5
        agree(model, plain, X)


def test_a_replaced_function_is_called_even_if_it_computes_the_same() -> None:
    calls = []

    class Feed(FeedForward):
        f = staticmethod(F.silu)

        def __init__(self) -> None:
            super().__init__()
            self.g = F.silu

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(self.g(self.w1(x)) * self.w3(x))

    def silu(x: Tensor) -> Tensor:
        calls.append(1)
        return F.silu(x)

    model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
    prac.compress(model, EXACT, include="*", example=X)
    assert isinstance(model[1], Compressed)
    model[1].g = silu
    with pytest.warns(UserWarning, match="its g was changed"):
        model(X).sum().backward()
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*does not do as planned")
def test_an_activation_that_somebody_holds() -> None:
    """Activations are compressed in a copy, since others may share them; what happens to the original counts too."""
    model = nn.Sequential(nn.Linear(N, 48), nn.GELU(), nn.Linear(48, N)).train()
    plain = copy.deepcopy(model)
    held, other = model[1], plain[1]
    handle = prac.compress(model, EXACT, include="*", example=X)
    agree(model, plain, X)
    changes: list[Callable[[Any], Any]] = [
        lambda m: setattr(m, "approximate", "tanh"),
        lambda m: m.register_forward_hook(lambda module, args, output: output * 2),
        lambda m: setattr(m, "forward", torch.tanh),
    ]
    for change in changes:
        change(held), change(other)
        agree(model, plain, X)
        with torch.no_grad():
            assert torch.equal(model.eval()(X), plain.eval()(X))
        model.train(), plain.train()
    assert "was changed" in {row.name: row for row in handle.rows()}["1"].note
    handle.restore()
    assert model[1] is held
    agree(model, plain, X)


def test_modules_that_change_themselves_or_look_at_their_weights_are_no_like_blocks() -> None:
    class Counts(FeedForward):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    class Remembers(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return super().forward(x)

    class Clips(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (4 / self.w2.weight.norm().clamp(min=4))

    class Looks(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * TABLE.get(self, 1.0)

    assert signature(Clips()) is None and signature(Looks()) is None and signature(FeedForward()) is not None
    torch.manual_seed(0)
    model = nn.Sequential(Counts(), Remembers(), Clips(), Clips(), Looks(), Looks()).train()
    with torch.no_grad():
        model[3].w2.weight.mul_(10)
    TABLE[model[5]] = 3.0
    try:
        handle = prac.compress(model, EXACT, include="*", example=X)
        kinds = {row.name: row.what for row in handle.rows()}
        found = [name for name in "012345" if kinds.get(name) == "activation"]
        assert found == ["2", "4"]
        expected = model(X)
        handle.restore()
        torch.testing.assert_close(expected, model(X))
    finally:
        TABLE.clear()
