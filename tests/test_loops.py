"""Compressed models in real training loops: the clock, recomputation, copies, precision."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import gradients
from models import BATCH, IDS, PAPER, build, compressed_names, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import prac
from prac.lab.methods.peers import checkpoint_blocks
from prac.layers import Compressed
from prac.memory import track_kept


def refreshes(model: nn.Module) -> set[int]:
    return {s.refreshes for m in model.modules() if isinstance(m, Compressed) for s in m.estimators.values()}


def test_refresh_follows_optimizer_steps_not_forwards() -> None:
    model = build("llama")
    handle = prac.compress(model, PAPER.replace(T1=2, T2=2))
    train(model, steps=5, micro=3)
    assert handle.step == 5
    assert refreshes(model) == {3}  # at steps 0, 2 and 4


def test_evaluation_in_between_changes_nothing() -> None:
    def run(evaluate: bool) -> list[float]:
        model = build("llama")
        prac.compress(model, PAPER.replace(T1=2, T2=2))
        losses = []
        for _ in range(4):
            losses += train(model, steps=1)
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(**BATCH)
                model.train()
        return losses

    assert run(True) == run(False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_uses_the_same_subspaces(reentrant: bool) -> None:
    """Under checkpointing gradients are the ones without it, to the bit, also across refreshes."""
    models = [build("llama"), build("llama")]
    for model in models:
        prac.compress(model, PAPER.replace(T1=1, T2=1))
    checkpoint_blocks(models[1], reentrant=reentrant)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for _ in range(3):
        plain, recomputed = (gradients(m, **BATCH) for m in models)
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[n], recomputed[n]) for n in plain)
        for optimizer in optimizers:
            optimizer.step()


def test_checkpointing_by_hand_keeps_inputs_only() -> None:
    model = build("plain")
    prac.compress(model, PAPER, example=IDS)
    x = model[0](IDS).detach().requires_grad_()
    with track_kept(model) as kept:
        checkpoint(model[1], x, use_reentrant=False)
    assert kept.total == 0


def test_a_deepcopy_trains_by_itself() -> None:
    model = build("llama")
    handle = prac.compress(model, PAPER)
    train(model, 2)
    twin = copy.deepcopy(model)
    train(twin, 3)
    assert handle.step == 2
    assert next(m for m in twin.modules() if isinstance(m, Compressed)).estimators["x"].clock.step == 5
    assert compressed_names(twin) == compressed_names(model)


# --- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_falls(family: str) -> None:
    model = build(family)
    prac.compress(model, PAPER.replace(T1=5, T2=5))
    losses = train(model, 40, lr=0.01)
    assert losses[-1] < losses[0] - 1.0


def test_runs_repeat_to_the_bit() -> None:
    def run() -> list[float]:
        model = build("llama")
        prac.compress(model, PAPER.replace(T1=3, T2=2))
        return train(model, 8)

    assert run() == run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_training(dtype: torch.dtype) -> None:
    """Pure bf16, and fp32 weights under bf16 autocast: gradients finite and in the parameters' dtype."""
    model = build("llama").to(dtype)
    prac.compress(model, PAPER)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        value = model(**BATCH).loss
    value.backward()
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in model.parameters())
