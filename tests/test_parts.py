"""Parts, classes and hooks that come later count; trying a module again disturbs nothing and holds nothing."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import agree
from models import FeedForward, N
from torch import Tensor, nn
from torch.nn.utils import prune

import prac
from prac.layers import Compressed
from prac.layers.base import MOST_TRIES

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


def buffer_later(m: Any) -> None:
    m.register_buffer("extra", torch.tensor(2.0))


def parameter_later(m: Any) -> None:
    m.extra = nn.Parameter(torch.tensor(2.0))


def child_later(m: Any) -> None:
    torch.manual_seed(7)
    m.extra = nn.Linear(N, N)


@pytest.mark.filterwarnings("ignore:.*keeps an input of its own")
@pytest.mark.parametrize("change", [buffer_later, parameter_later, child_later])
@pytest.mark.parametrize("slot", [None, "parameter", "buffer", "module"])
def test_parts_that_come_later_count(change: Callable[[Any], None], slot: str | None) -> None:
    class Feed(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            if slot is not None:
                getattr(self, f"register_{slot}")("extra", None)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if not hasattr(self, "extra") or self.extra is None:
                return y
            return self.extra(y) if callable(self.extra) and not isinstance(self.extra, Tensor) else self.extra * y

    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    assert isinstance(model[1], Compressed)
    for each in (model, plain):
        if slot is not None:
            del each[1].extra
        change(each[1])
    with pytest.warns(UserWarning, match="its extra was changed"):
        agree(model, plain, X)


class Feed(FeedForward):
    k = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.act, self.idle, self.end = nn.SiLU(), nn.Dropout(0.0), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.w2(self.idle(self.act(self.w1(x)) * self.w3(x)))) * self.k


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
def test_classes_and_hooks_of_children_count() -> None:
    class Doubled(nn.SiLU):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    def in_front(name: str) -> Callable[[Any], None]:
        def change(m: Any) -> None:
            module = m.get_submodule(name)
            base = type(module)
            body = {"forward": lambda self, x: 2 * base.forward(self, x)} if name else {"k": 2.0}
            module.__class__ = type("Front", (base,), body)

        return change

    changes: list[Callable[[Any], Any]] = [
        *(in_front(name) for name in ("", "w1", "w2", "act")),
        lambda m: setattr(m, "act", Doubled()),
        lambda m: m.end.register_forward_hook(lambda module, args, y: 2 * y),
        lambda m: m.idle.register_forward_hook(lambda module, args, y: 2 * y),
        lambda m: m.act.register_forward_hook(lambda module, args, y: 2 * y),
    ]
    for change in changes:
        for before in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
            plain = copy.deepcopy(model)
            for each in (model, plain) if before else ():
                change(each[1])
            prac.compress(model, EXACT, include="*", example=X)
            for each in (model, plain) if not before else ():
                change(each[1])
            agree(model, plain, X)


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
def test_global_hooks_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if isinstance(module, nn.SiLU) else None
    )
    try:
        agree(model, plain, X)
    finally:
        hook.remove()


def test_one_warning_and_so_many_tries_for_what_changes_at_every_step() -> None:
    class Feed(FeedForward):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if self.scale > 0 else 2.0)

    model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
    handle = prac.compress(model, EXACT, include="*", example=X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            model[1].scale = 1.0 + step
            model(X).sum().backward()
    texts = [str(w.message) for w in caught if "scale was changed" in str(w.message)]
    assert len(texts) == 1 and model[1]._prac.tries == MOST_TRIES
    assert "scale was changed" in handle.summary()


def test_trying_a_module_again_leaves_a_graph_in_the_making_alone() -> None:
    class First(nn.Module):
        def __init__(self, c: Any) -> None:
            super().__init__()
            self.fc, self.c = nn.Linear(N, N), c

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.c.tensor

    class Feed(FeedForward):
        def __init__(self, c: Any) -> None:
            super().__init__()
            self.c = c

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if self.c.step < 100 else 2.0) + 0.0 * self.c.tensor.detach()[0]

    c = SimpleNamespace(tensor=torch.ones(N), step=0)
    model = nn.Sequential(First(c), nn.RMSNorm(N), Feed(c)).train()
    prac.compress(model, EXACT, include="*", example=X)
    for step in range(3):
        c.step = step
        model(X).sum().backward()
    assert isinstance(model[2], Compressed)


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
def test_an_mlp_that_leaves_autocast_is_none() -> None:
    class Leaves(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), Leaves()).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == plain(X).dtype == torch.float32


class Scaled(FeedForward):
    """By a tensor, or where that is None by a number."""

    def __init__(self, otherwise: float) -> None:
        super().__init__()
        self.scale: Any = torch.ones(())
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.otherwise if self.scale is None else self.scale)


def test_tensors_that_a_module_held_are_not_held_longer() -> None:
    model = nn.Sequential(nn.RMSNorm(N), Scaled(1.0), nn.Linear(N, N)).train()
    prune.l1_unstructured(model[2], "weight", 0.5)
    prac.compress(model, EXACT, include="*", example=X)
    refs = [weakref.ref(model[1].scale), weakref.ref(model[2].weight)]
    model[1].scale = None
    model(X).sum().backward()
    del model[2].weight
    assert not any(ref() is not None for ref in refs)


@pytest.mark.filterwarnings("ignore:.*keeps an input of its own")
def test_a_tensor_that_is_gone_is_not_taken_for_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(N), Scaled(2.0)).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    assert isinstance(model[1], Compressed)
    model[1].scale = plain[1].scale = None
    with pytest.warns(UserWarning, match="its scale was changed"):
        agree(model, plain, X)
