"""The clock: optimizer steps, of one model, counted once."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prac
from prac.estimators.clock import Clock
from prac.estimators.subspace import Subspace


def train_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()


def test_clock_counts_optimizer_steps_of_its_own_model() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    clock, sgd, stranger = Clock(model), torch.optim.SGD(model.parameters()), torch.optim.SGD(other.parameters())
    assert clock.step == 0
    train_step(model, sgd)
    assert clock.step == 1
    train_step(other, stranger)
    assert clock.step == 1


def test_two_optimizers_on_one_model_make_one_step() -> None:
    model = nn.Linear(2, 2)
    clock = Clock(model)
    optimizers = torch.optim.AdamW([model.weight]), torch.optim.SGD([model.bias])
    for t in range(3):
        train_step(model, *optimizers)
        assert clock.step == t + 1


def test_clock_of_a_copy_follows_the_copy() -> None:
    model = nn.Linear(2, 2)
    model.clock = Clock(model)
    train_step(model, torch.optim.SGD(model.parameters()))
    twin = copy.deepcopy(model)
    assert twin.clock.step == 1
    train_step(twin, torch.optim.SGD(twin.parameters()))
    assert (model.clock.step, twin.clock.step) == (1, 2)


def test_clock_can_be_ticked_by_hand() -> None:
    clock = Clock(nn.Linear(1, 1))
    clock.tick()
    assert clock.step == 1


# --- whose steps ---------------------------------------------------------------------

EVERY_STEP = prac.PRESETS["paper"].replace(T1=1, T2=1)


def blocks(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(count)))


def backward(model: Callable[[Tensor], Tensor]) -> Tensor:
    loss = model(torch.randn(64, 32, requires_grad=True)).square().mean()
    loss.backward()
    return loss


def subspaces(model: nn.Module) -> list[Subspace]:
    return [m.estimators["x"] for m in model.modules() if isinstance(m, prac.layers.Compressed)]


def steps_of(model: nn.Module) -> int:
    return subspaces(model)[0].clock.step


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        backward(model)
        optimizer.step()


def gone(whole: nn.Module) -> nn.Module:
    return whole[1]


def moved(whole: nn.Module) -> nn.Module:
    return nn.Sequential(whole[0], nn.Linear(32, 32))


def copied(whole: nn.Module) -> nn.Module:
    return copy.deepcopy(whole[1])


def copied_among_others(whole: nn.Module) -> nn.Module:
    return copy.deepcopy([whole[0], whole[1]])[1]


def with_new_parameters(whole: nn.Module) -> nn.Module:
    for module in whole.modules():
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(parameter.detach().double().float()))
    return whole


def with_others_beside(whole: nn.Module) -> nn.Module:
    """As adapters are: only what came later is trained."""
    whole.requires_grad_(False)
    whole[0].requires_grad_(True)
    whole[0].register_parameter("later", nn.Parameter(torch.zeros(1)))
    return whole[0]


@pytest.mark.parametrize("made", [gone, moved, copied, copied_among_others, with_new_parameters, with_others_beside])
def test_what_is_left_of_a_model_is_counted_on(made: Callable[[nn.Module], nn.Module]) -> None:
    whole = blocks()
    prac.compress(whole, EVERY_STEP, include="*")
    train(whole)
    part = made(whole)
    del whole
    gc.collect()
    assert steps_of(part) == 3
    train(part)
    assert steps_of(part) == 6
    assert subspaces(part)[0].refreshes in (3, 5, 6)  # six, less the steps in which it did not run


def test_a_clock_that_went_through_a_file_knows_no_model_yet() -> None:
    model = blocks(1)
    prac.compress(model, EVERY_STEP, include="*")
    train(model)
    twin = copy.deepcopy(model)
    (subspace,) = subspaces(twin)
    subspace.clock = subspace.storage.clock = pickle.loads(pickle.dumps(subspace.clock))
    train(twin)
    assert (steps_of(model), steps_of(twin)) == (3, 6)


def master_copies(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    masters = [p.detach().double().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-3)

    def step() -> None:
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad, p.grad = p.grad.double(), None
        optimizer.step()
        for p, master in zip(model.parameters(), masters, strict=True):
            p.data.copy_(master)

    return optimizer, step


def flat_shard(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    optimizer = torch.optim.SGD([flat], lr=1e-3)

    def step() -> None:
        flat.grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize("way", [master_copies, flat_shard])
def test_an_optimizer_that_holds_copies(way: Callable[[nn.Module], tuple[object, Callable[[], None]]]) -> None:
    model, other = blocks(), blocks()
    handle, beside = (prac.compress(each, EVERY_STEP, include="*") for each in (model, other))
    train(other, 1)
    _, step = way(model)
    for t in range(1, 4):
        for _ in range(2):  # gradients are accumulated
            backward(model)
        assert handle.step == t - 1
        step()
        assert handle.step == t
    assert {s.refreshes for s in subspaces(model)} == {3}
    assert beside.step == 1


def test_a_stranger_is_not_counted_where_it_can_be_told() -> None:
    model, stranger = blocks(), blocks()
    handle = prac.compress(model, EVERY_STEP, include="*")
    train(stranger)
    assert handle.step == 0  # this model did not run
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    backward(model)
    optimizer.step()
    backward(model)
    train(stranger)
    assert handle.step == 1  # it has an optimizer of its own
    by_hand = blocks()
    handle = prac.compress(by_hand, EVERY_STEP, include="*")
    backward(by_hand)
    handle.tick()
    backward(by_hand)
    train(stranger)
    assert handle.step == 1  # it is told


# --- when ----------------------------------------------------------------------------


def per_block(reentrant: bool) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def wrap(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for block in model:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

        return run

    return wrap


def whole(reentrant: bool) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant)


LOOPS = {
    "plain": lambda model: model,
    "blocks": per_block(False),
    "blocks, reentrant": per_block(True),
    "whole": whole(False),
    "whole, reentrant": whole(True),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_an_optimizer_for_each_layer(loop: str) -> None:
    """They step while backward still runs, between recomputations: a pass is one step, and has one P for each layer."""
    model = blocks(4)
    handle = prac.compress(model, EVERY_STEP, include="*")
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    run = LOOPS[loop](model)
    for t in range(1, 5):
        backward(run)
        assert {s.refreshes for s in subspaces(model)} == {t}
        if loop != "whole, reentrant":  # nothing there runs outside of backward, so that a look would move the count
            assert handle.step == t
    assert handle.step == 4


@pytest.mark.parametrize("loop", LOOPS)
def test_one_optimizer_under_checkpointing(loop: str) -> None:
    model = blocks()
    handle = prac.compress(model, EVERY_STEP, include="*")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        for _ in range(2):
            backward(LOOPS[loop](model))
        optimizer.step()
    assert handle.step == 3
    assert {s.refreshes for s in subspaces(model)} == {3}


def test_a_closure_that_runs_the_model_many_times_is_one_step() -> None:
    model = blocks()
    handle = prac.compress(model, EVERY_STEP, include="*")
    optimizer, calls = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=4), []

    def closure() -> Tensor:
        calls.append(handle.step)
        optimizer.zero_grad()
        return backward(model)

    for _ in range(3):
        optimizer.step(closure)
    assert handle.step == 3
    assert sorted(set(calls)) == [0, 1, 2] and len(calls) > 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused: bool) -> None:
    model = blocks()
    handle = prac.compress(model, EVERY_STEP, include="*")
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=fused), torch.amp.GradScaler("cpu")
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = model(torch.randn(64, 32)).square().mean()
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert handle.step == 2
