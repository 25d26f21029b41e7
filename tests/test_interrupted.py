"""A call that Ctrl-C or sys.exit() ends leaves nothing behind, though torch runs no hook at its end."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import IDS, N, build
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import prac
from prac.convert.head import calls
from prac.runtime.under_way import UnderWay

X = torch.randn(8, N, generator=torch.Generator().manual_seed(1))


class Stops(nn.Module):
    """Looks at a number, so that its first step is watched, and is interrupted where it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(N), nn.Linear(N, N), nn.Linear(N, N)
        self.stops: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.a(h)
        if y.sum().item() > 1e9:
            y = -y
        if self.stops is not None:
            raise self.stops
        return y + self.b(h)


def interrupted(stops: type[BaseException]) -> tuple[nn.Module, prac.Handle]:
    model = Stops().train()
    model.stops = stops
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8), include="*")
    with pytest.raises(stops):
        model(X)
    model.stops = None
    return model, handle


def trained() -> list[weakref.ref[Tensor]]:
    """References to what training another model saved, when it has been."""
    other = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    y = other[:2](X)
    other[2](y).sum().backward()
    return [weakref.ref(y.detach().untyped_storage()), weakref.ref(y)]


def is_clean() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None and not _get_current_function_mode_stack()


@pytest.mark.parametrize("stops", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_first_step(stops: type[BaseException]) -> None:
    model, handle = interrupted(stops)
    for _ in range(2):
        assert [each() for each in trained()] == [None, None]
    model(X).sum().backward()
    assert is_clean() and not handle._conversion.shared.is_watched
    assert [row.note for row in handle.rows() if row.what == "linear"] == ["from x̂ of norm"] * 2


@pytest.mark.parametrize("restored", [True, False])
def test_and_what_becomes_of_its_model(restored: bool) -> None:
    model, handle = interrupted(KeyboardInterrupt)
    batch = weakref.ref(X)
    if restored:
        handle.restore()
        assert is_clean()
    alive = [weakref.ref(p) for p in model.parameters()]
    del model, handle
    gc.collect()
    assert not any(each() is not None for each in alive) and batch() is X
    assert is_clean()


@pytest.mark.parametrize("stops", [KeyboardInterrupt, ValueError])
def test_an_interrupted_step_with_the_chunked_loss(stops: type[BaseException]) -> None:
    model = build("llama")
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8), loss="chunked")

    def stop(*_: object) -> None:
        raise stops

    hook = model.model.layers[1].register_forward_hook(stop)
    for _ in range(2):
        with pytest.raises(stops):
            model(input_ids=IDS, labels=IDS)
    hook.remove()
    hidden = model.model(input_ids=IDS).last_hidden_state.detach()
    assert type(model.lm_head(hidden)) is Tensor
    assert len(calls.stack) == 0
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits is None and not calls.stack
    with pytest.raises(stops):
        hook = model.model.layers[1].register_forward_hook(stop)
        model(input_ids=IDS, labels=IDS)
    head = weakref.ref(model.lm_head.weight)
    del model, handle, output, hook
    gc.collect()
    assert head() is None


def test_a_call_is_over_when_it_is() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            asked.append(found[0].is_over())
            return self.inner(x)

    model, found, asked = Outer(), [], []
    model.register_forward_pre_hook(lambda module, args: found.append(UnderWay(module)))
    model.inner.register_forward_pre_hook(lambda module, args: asked.append(found[0].is_over()))
    model(X)
    assert asked == [False, False] and found[0].is_over()
    assert not UnderWay(model).is_over()  # made where no call is seen: it cannot be told
