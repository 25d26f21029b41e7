"""What changes without effect costs nothing, and what is called, held or shared by others is what it is."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable
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
from prac.layers.way import way

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


TABLE: dict[Any, float] = {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_changes_without_effect_costs_nothing(family: str) -> None:
    """Settings of the whole model are in the config that every MLP refers to; a copy is as good as the original."""
    model = build(family)
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
        mlp = twin.model.layers[0].mlp if family == "llama" else twin.transformer.h[0].mlp
        setattr(mlp, "act_fn" if family == "llama" else "act", nn.ReLU())
        twin(**BATCH).loss.backward()


def test_what_prac_makes_of_children_is_not_looked_at() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    before = way(mlp)
    prac.compress(model, EXACT)
    after = way(mlp, before.of_class)
    assert after.words == before.words and len(after.reached) == len(before.reached)


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


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
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


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
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
        assert found == ["4"]  # what looks at weights is none
        expected = model(X)
        handle.restore()
        torch.testing.assert_close(expected, model(X))
    finally:
        TABLE.clear()


def test_the_summary_forgets_what_was_undone() -> None:
    model = build("llama")
    handle = prac.compress(model, EXACT)
    model(**BATCH).loss.backward()
    before, act = handle.summary(), model.model.layers[0].mlp.act_fn
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    with pytest.warns(UserWarning, match="act_fn was changed"):
        model(**BATCH).loss.backward()
    assert "an input of its own" in handle.summary()
    model.model.layers[0].mlp.act_fn = act
    model(**BATCH).loss.backward()
    assert handle.summary() == before
    assert "in eval mode" not in before
    model.eval()
    assert "nothing is compressed until model.train()" in handle.summary()


def test_folded_rows_name_what_each_reads() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(N) for _ in range(2))
            self.layers = nn.ModuleList(nn.Linear(N, N) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + layer(norm(x)).tanh()
            return x

    handle = prac.compress(Lists(), EXACT, include="*", example=X)
    (line,) = [line for line in handle.summary().splitlines() if line.startswith("layers")]
    assert line.startswith("layers.[0-1] ×2") and line.endswith("norms.[0-1]")
