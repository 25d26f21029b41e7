"""Numerics under fire: the batches and the treatment that no one wants, and everyone gets."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from models import BATCH, IDS, build, train
from torch import Tensor, nn

import prac
from prac.layers import Compressed

CONFIGS = {name: prac.PRESETS[name].replace(min_width=8, T1=2, T2=2) for name in ("paper", "lean", "fast", "small")}
every_preset = pytest.mark.parametrize("preset", CONFIGS)


class Net(nn.Module):
    """Norm, MLP and head without embeddings, so that any input can be given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act, self.head = nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.act(self.up(self.norm(x)))))


def net(preset: str) -> Net:
    torch.manual_seed(0)
    model = Net().train()
    prac.compress(model, CONFIGS[preset], include="*", example=torch.zeros(2, 40, 32))
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ordinary(seed: int = 0, tokens: int = 40) -> Tensor:
    return torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(seed))


@every_preset
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_leaves_nothing_behind(preset: str, poison: float) -> None:
    """Its own gradients are not finite, so that a loss scaler or a check sees it; those of the next batch are."""
    model = net(preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        step(model, ordinary())
        optimizer.step()
    x = ordinary(1)
    x[0, 3, 5] = poison
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = step(model, x)  # a refresh is due here
    assert not all(g.isfinite().all() for g in found.values())
    if preset == "paper":
        assert any("refresh at step 2 skipped" in str(w.message) for w in caught)
    optimizer.zero_grad()  # as whoever sees them does
    optimizer.step()
    assert all(g.isfinite().all() for g in step(model, ordinary(2)).values())


@every_preset
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 40, 32), torch.ones(2, 40, 32), torch.ones(2, 40, 1) * torch.arange(32.0), ordinary() * 1e-20],
    ids=["zeros", "constant", "one row again and again", "tiny"],
)
def test_degenerate_batches(preset: str, x: Tensor) -> None:
    model = net(preset)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    found, expected = step(model, x), step(plain.train(), x)
    assert all(g.isfinite().all() for g in found.values())
    # The head reads few directions, or none: rank-deficient inputs lose nothing, few bits a little.
    error = (found["head.weight"] - expected["head.weight"]).norm()
    assert error <= 0.35 * expected["head.weight"].norm() + 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert all(g.isfinite().all() for g in step(model, ordinary()).values())


@every_preset
def test_a_rank_deficient_batch(preset: str) -> None:
    """Fewer directions than r1: what there is, is kept, and the rest is filled up."""
    model = net(preset)
    x = (torch.randn(80, 3) @ torch.randn(3, 32)).view(2, 40, 32)
    assert all(g.isfinite().all() for g in step(model, x).values())


@pytest.mark.parametrize("preset", ["lean", "small"])
def test_one_token(preset: str) -> None:
    assert all(g.isfinite().all() for g in step(net(preset), torch.randn(1, 1, 32)).values())


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_one_token_after_a_basis_is_there(preset: str) -> None:
    model = net(preset)
    step(model, ordinary())
    assert all(g.isfinite().all() for g in step(model, torch.randn(1, 1, 32)).values())


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_a_short_batch_when_a_refresh_is_due_keeps_the_old_basis(preset: str) -> None:
    model = net(preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        step(model, ordinary())
        optimizer.step()
    with pytest.warns(UserWarning, match=r"skipped, keeping the old subspace: 2 tokens cannot span"):
        found = step(model, torch.randn(1, 2, 32))
    assert all(g.isfinite().all() for g in found.values())


@every_preset
def test_another_length_every_step(preset: str) -> None:
    model = net(preset)
    step(model, ordinary())
    for length in (39, 17, 25, 31, 18):
        assert all(g.isfinite().all() for g in step(model, ordinary(length, length)).values())


@every_preset
def test_fp16_and_a_scale_that_overflows(preset: str) -> None:
    """As GradScaler has it: the overflowing step is skipped, the scale falls, training goes on."""
    model = net(preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scales = []
    for seed in range(12):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autocast("cpu", torch.float16):
                loss = model(ordinary(seed)).float().square().mean()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**24
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


@every_preset
def test_moved_to_another_dtype_after_compress(preset: str) -> None:
    model = net(preset)
    step(model, ordinary())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        found = step(model, ordinary(1).to(dtype))
        assert all(g.isfinite().all() and g.dtype == dtype for g in found.values())


@pytest.mark.parametrize("group", [None, prac.Bits(32)], ids=["alone", "in groups"])
def test_weights_tied_after_compress(group: prac.Bits | None) -> None:
    full = prac.Bits(32)
    model, plain = build("llama"), build("llama")
    prac.compress(model, prac.Config(linear=full, norm=full, activation=full, group=group, min_width=1))
    for each in (model, plain):
        each.lm_head.weight = each.model.embed_tokens.weight
        each(**BATCH).loss.backward()
    ours, theirs = (m.model.embed_tokens.weight.grad for m in (model, plain))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@every_preset
def test_eval_in_the_middle_and_several_models_at_once(preset: str) -> None:
    """Two models that take turns train as each does alone."""

    def alone(seed: int) -> list[float]:
        model = build("llama", seed)
        prac.compress(model, CONFIGS[preset])
        return train(model, 3)

    models = [build("llama", seed) for seed in (0, 1)]
    for model in models:
        prac.compress(model, CONFIGS[preset])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    losses: list[list[float]] = [[], []]
    for _ in range(3):
        for model, optimizer, found in zip(models, optimizers, losses, strict=True):
            loss = model(**BATCH).loss
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()(**BATCH)
            model.train()
    assert losses == [alone(0), alone(1)]


@every_preset
def test_threads(preset: str) -> None:
    """Models in threads of their own do not disturb each other."""
    expected = []
    models = []
    for seed in range(3):
        model = build("llama", seed)
        prac.compress(model, CONFIGS[preset])
        models.append(model)
        expected.append(train(copy.deepcopy(model), 3))
    found: dict[int, list[float]] = {}

    def work(i: int) -> None:
        found[i] = train(models[i], 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == expected


def test_index_arithmetic_beyond_two_to_the_31() -> None:
    """On tensors that have shapes and no numbers: 2^31 elements and more, in every preset."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=32,
                        vocab_size=1000)
        ).to(torch.bfloat16)  # fmt: skip
        ids = torch.empty(160, 4096, dtype=torch.long)
    assert 160 * 4096 * 4096 > 2**31
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    plain = prac.predict(model, batch, loss="chunked").activations
    for name in CONFIGS:
        assert 0 < prac.predict(model, batch, name, loss="chunked").activations < plain


def test_frozen_layers_are_left_out_and_come_back() -> None:
    model = build("llama")
    prac.compress(model, CONFIGS["lean"])
    frozen = [m for m in model.modules() if isinstance(m, Compressed)]
    for module in frozen:
        module.requires_grad_(False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for module in frozen:
        module.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for module in frozen for p in module.parameters())
