"""Checkpointing finds in backward what it left in forward, also in the step in which prac first sees the model."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import agree, relative
from liveness import live_bytes
from models import IDS, Block, N
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prac

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
# Ranks that lose nothing, so that the exact scalar is used.
RANK = EXACT.replace(group=prac.Rank(0.0, 1.0), linear=FULL)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=99, d_model=N, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [EXACT, RANK, prac.PRESETS["paper"].replace(min_width=8)])
def test_encoder_decoders_under_checkpointing(config: prac.Config, reentrant: bool) -> None:
    model = bart()
    plain = copy.deepcopy(model)
    prac.compress(model, config)
    for m in (model, plain):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.config.use_cache = False
        torch.manual_seed(1)
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if config in (EXACT, RANK) and q.grad is not None and q.grad.abs().max() > 1e-4:
            assert relative(p.grad, q.grad) < 1e-3, name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("config", [EXACT, RANK])
def test_the_first_step_of_a_checkpointed_block(config: prac.Config, given: bool, reentrant: bool) -> None:
    block, x = nn.Sequential(Block(), Block()).train(), X.clone().requires_grad_()
    plain = copy.deepcopy(block)
    prac.compress(block, config, include="*", **({"example": X} if given else {}))
    for m in (block, plain):
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), plain.named_parameters(), strict=True):
        assert relative(p.grad, q[1].grad) < 1e-4, name


class Asks(nn.Module):
    """Checkpoints its blocks, and looks at a number between them: no copy without numbers can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(N, N), nn.ModuleList([Block(), Block()]), nn.Linear(N, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if x.isnan().any():
                raise ValueError("not a number")
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


@pytest.mark.parametrize("config", [EXACT, prac.PRESETS["lean"].replace(min_width=8)])
def test_blocks_computed_again_after_a_first_step_that_was_watched(config: prac.Config) -> None:
    torch.manual_seed(0)
    model = Asks().train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, config, include="*")
    for _ in range(3):
        if config is EXACT:
            agree(model, plain, X)
        model(X).sum().backward()
    notes = {row.name: row.note for row in handle.rows()}
    assert notes["blocks.0.mlp.w1"] == "from x̂ of norm2"  # seen, though it runs as one operation with the others
    assert "does not" not in handle.summary() and "no example" not in handle.summary()


class PostNorm(nn.Module):
    """Its output is that of a norm, which linear layers in the next block read."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Linear(N, N), nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.f(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PostNorm() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("config", [EXACT, RANK, prac.PRESETS["lean"].replace(min_width=8)])
def test_what_a_block_keeps_ends_with_it(config: prac.Config, given: bool) -> None:
    """Also where its output is read by layers of the next block, which then keep an input of their own."""
    torch.manual_seed(0)
    model = Checkpointed().train()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, config, include="*", **({"example": X} if given else {}))
    alive = {}
    for m in (model, plain):
        m(X).sum().backward()
        m.zero_grad()
        alive[m], loss = live_bytes(lambda m=m: m(X).sum())
        loss.backward()
    # The last block's, whose output no layer of prac reads, are there until its backward.
    row = X.numel() // N * 4
    assert alive[model] <= alive[plain] + row * (N + 8)
    if config is not RANK:
        assert "in another block, which checkpointing computes again" in handle.summary()
    if config in (EXACT, RANK):
        agree(model, plain, X)


def test_an_eval_mode_before_what_is_computed_again() -> None:
    model, x = nn.Sequential(Block(), Block()).train(), X.clone().requires_grad_()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    for m in (model, plain):
        m.train()
        loss = checkpoint(m, x, use_reentrant=False).square().sum()
        m.eval()
        loss.backward()
    assert all(relative(p.grad, q.grad) < 1e-3 for p, q in zip(model.parameters(), plain.parameters(), strict=True))
