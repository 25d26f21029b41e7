"""Nothing that prac saw or kept outlives the model, also without the garbage collector; no trace is left on modules."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from liveness import live_bytes
from models import BATCH, IDS, M, N, build
from torch import Tensor, nn

import prac
from prac.allocation import allocate
from prac.convert.calibrate import calibrate
from prac.layers import Compressed
from prac.memory import track_kept


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only counted references free anything."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def only_compressed(model: nn.Module, x: Tensor) -> None:
    prac.compress(model, "lean")


def with_example(model: nn.Module, x: Tensor) -> None:
    prac.compress(model, "small", example=x)
    step(model, x)


def by_the_first_batch(model: nn.Module, x: Tensor) -> None:
    prac.compress(model, "lean")
    step(model, x)


def at_a_rank(model: nn.Module, x: Tensor) -> None:
    prac.compress(model, prac.PRESETS["fast"].replace(min_width=8), example=x)
    step(model, x)


def restored(model: nn.Module, x: Tensor) -> None:
    handle = prac.compress(model, "lean", example=x)
    step(model, x)
    handle.restore()


def failed(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="exceeds the width"):
        prac.compress(model, prac.Config(linear=prac.Rank(64, 64), min_width=1), example=x)


def failing_example(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="fails on the example"):
        prac.compress(model, "lean", example=x.new_zeros(3, 5, 7))


def calibrated(model: nn.Module, x: Tensor) -> None:
    config = prac.PRESETS["one-shot"].replace(min_width=8)
    calibrate(prac.compress(model, config), [x, x])
    step(model, x)


def allocated(model: nn.Module, x: Tensor) -> None:
    prac.compress(model, allocate(model, x, 400, objective=lambda y: y.square().mean()).config, example=x)
    step(model, x)


class Asks(nn.Module):
    """Decides by a number that it computes, which a copy without numbers cannot."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum().item() < 1e9 else -y


def watched(model: nn.Module, x: Tensor) -> None:
    asks = Asks(model)
    handle = prac.compress(asks, "lean")
    step(asks, x)
    assert "has no example" not in handle.summary()
    step(asks, x)


def watched_with_example(model: nn.Module, x: Tensor) -> None:
    asks = Asks(model)
    prac.compress(asks, "lean", example=x)
    step(asks, x)


@pytest.mark.parametrize(
    "use",
    [
        only_compressed, with_example, by_the_first_batch, at_a_rank, restored, failed, failing_example, calibrated,
        allocated, watched, watched_with_example,
    ],
)  # fmt: skip
def test_after_del_nothing_is_alive(use: Callable[[nn.Module, Tensor], None], no_collector: None) -> None:
    model, x = build("plain")[1:], torch.randn(4, 17, N)  # without the embedding: floats in
    use(model, x)
    watched = [weakref.ref(t) for t in (*model.parameters(), x)]
    if use in (failed, failing_example):
        gc.collect()  # pytest holds the error, and so its frames
    del model, x
    assert sum(reference() is not None for reference in watched) == 0


class Modulated(nn.Module):
    """A block whose norm's output is changed before anybody reads it, as in diffusion transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(N, elementwise_affine=False)
        self.fc, self.act, self.proj, self.ada = nn.Linear(N, M), nn.GELU(), nn.Linear(M, N), nn.Linear(N, 3 * N)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.ada(c)[:, None].chunk(3, -1)
        return x + gate * self.proj(self.act(self.fc(self.norm(x) * (1 + scale) + shift)))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("preset", ["lean", "small", "fast", "paper"])
def test_what_lives_is_what_is_reported(preset: str, given: bool) -> None:
    """Bytes alive after a forward pass, by weak references to storages, are those that track_kept reports."""
    model = Modulated().train()
    x, c = torch.randn(4, 40, N, requires_grad=True), torch.randn(4, N)
    config = prac.PRESETS[preset].replace(min_width=8, attention_bits=None)
    prac.compress(model, config, **({"example": (x, c)} if given else {}))
    model(x, c).sum().backward()
    with track_kept(model, (x, c)) as kept:
        model(x, c)
    found, output = live_bytes(lambda: model(x, c))
    own = output.untyped_storage().nbytes()
    assert found - own == kept.total


def traces(model: nn.Module) -> dict[str, Any]:
    return {
        name: (type(module), {k: (dict(v) if isinstance(v, dict) else v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


class Counts(nn.Module):
    """Changes itself, its config and a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = build("plain")[1:-1], nn.BatchNorm1d(17)
        self.seen, self.calls, self.config = 0, [], CountsConfig()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls.append(x.shape)
        self.config.longest = x.shape[1]
        self.total += x.sum().detach()
        return self.norm(self.inner(x))


class CountsConfig:
    longest = 0


def test_no_trace_of_the_probe_and_none_after_restore() -> None:
    model, x = Counts().train(), torch.randn(4, 17, N)
    called: list[int] = []
    model.inner[0].register_forward_hook(lambda *_: called.append(1))
    before, random = traces(model), torch.random.get_rng_state()
    handle = prac.compress(model, "lean", example=x)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not called and not model.seen and not model.calls and not vars(model.config) and not model.total
    assert not model.norm.num_batches_tracked
    during = traces(model)
    compressed = {name for name, module in model.named_modules() if isinstance(module, Compressed)}
    assert compressed and all(during[name] == before[name] for name in before.keys() - compressed)
    assert all(set(during[n][1]) == set(before[n][1]) | {"_prac"} for n in compressed)
    handle.restore()
    assert traces(model) == before


def test_no_trace_without_an_example_once_a_batch_has_come() -> None:
    model = build("plain")
    before = traces(model)
    handle = prac.compress(model, "lean")
    model(IDS).sum().backward()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert handle.restore() is model
    after = traces(model)
    assert all(after[name] == before[name] for name in before)


def test_an_activation_that_others_use_too_is_left_to_them() -> None:
    shared = nn.GELU()
    mine, theirs = (nn.Sequential(nn.Linear(N, M), shared, nn.LayerNorm(M)).train() for _ in range(2))
    handle = prac.compress(mine, "lean", include="*", example=torch.randn(2, 9, N))
    assert isinstance(mine[1], Compressed) and mine[1] is not shared
    assert type(shared) is nn.GELU and theirs[1] is shared and set(vars(shared)) == set(vars(nn.GELU()))
    handle.restore()
    assert mine[1] is shared


def test_a_hundred_rounds_take_no_memory() -> None:
    def rounds(count: int) -> int:
        for _ in range(count):
            model = build("llama")
            handle = prac.compress(model, "lean")
            for _ in range(3):
                model(**BATCH).loss.backward()
            handle.restore()
            del model, handle
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    first = rounds(3)
    assert rounds(20) <= first
