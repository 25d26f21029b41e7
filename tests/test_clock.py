"""The clock: optimizer steps, of one model, counted once."""

from __future__ import annotations

import copy

import torch
from torch import nn

from prac.clock import Clock


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
