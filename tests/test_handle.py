"""What ``compress`` returns: state, reconstruction error, summary."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import gradients, loss, relative
from models import BATCH, FAMILIES, LAYERS, PAPER, TEXT, N, build, train
from torch import nn

import prac
from prac.memory import track_kept


def test_state_resumes_to_the_bit() -> None:
    """Train 3 + 5 steps with the state saved and loaded in between, in a fresh model, through torch.save."""
    config = PAPER.replace(T1=4, T2=2)
    model = build("llama")
    handle = prac.compress(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        value = model(**BATCH).loss
        value.backward()
        optimizer.step()
        return value.item()

    for _ in range(3):
        step(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "prac": handle.state_dict()}, file)
    expected = [step(model, optimizer) for _ in range(5)]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build("llama", seed=1)
    twin = prac.compress(resumed, config)
    resumed.load_state_dict(saved["model"])
    twin.load_state_dict(saved["prac"])
    assert twin.step == 3
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05)
    assert [step(resumed, optimizer) for _ in range(5)] == expected


def test_state_of_another_model_is_refused() -> None:
    saved = prac.compress(build("gpt2"), PAPER).state_dict()
    with pytest.raises(ValueError, match="of other layers"):
        prac.compress(build("llama"), PAPER).load_state_dict(saved)
    model = build("llama")
    handle = prac.compress(model, PAPER)
    train(model, 1)
    with pytest.raises(ValueError, match="resume with the config"):
        prac.compress(build("llama"), PAPER.replace(linear=prac.Rank(4, 4))).load_state_dict(handle.state_dict())
    with pytest.raises(ValueError, match="resume with the config"):  # of the same shape, and another estimate
        prac.compress(build("llama"), PAPER.replace(linear=prac.Rank(0.3, 0.3, k=0.2))).load_state_dict(
            handle.state_dict()
        )
    in_bits = PAPER.replace(linear=prac.Bits(8), norm=prac.Bits(8), activation=prac.Bits(8))
    other = prac.compress(build("llama"), PAPER)
    with pytest.raises(ValueError, match="of another config: it has no subspace of model"):
        other.load_state_dict(prac.compress(build("llama"), in_bits).state_dict())
    assert other.step == 0


def test_reconstruction_error() -> None:
    """PAC's is the tail's share of the energy, per layer, and asking changes nothing."""
    model = build("llama")
    handle = prac.compress(model, PAPER.replace(linear=prac.Rank(0.3, 0.0)), include="*_proj")
    with pytest.raises(RuntimeError, match="at least one training step"):
        handle.reconstruction_error(TEXT)
    inputs: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda m, args, y: inputs.update(x=args[0].detach().reshape(-1, args[0].shape[-1])))
    loss(model(**TEXT)).backward()
    state = copy.deepcopy(handle.state_dict())
    model.eval()
    errors = handle.reconstruction_error(TEXT)
    assert not model.training
    energy = torch.linalg.svdvals(inputs["x"].double()).square()
    tail = energy[layer.estimators["x"].r1 :].sum() / energy.sum()
    assert errors["model.layers.1.mlp.down_proj"] == pytest.approx(tail.item(), rel=1e-3)
    assert len(errors) == LAYERS * 4  # q, k, v and gate, up share
    after = handle.state_dict()["subspaces"]
    assert all(torch.equal(after[n]["p"], s["p"]) for n, s in state["subspaces"].items())


def test_frozen_then_unfrozen() -> None:
    model = build("llama")
    handle = prac.compress(model, PAPER)
    for p in model.parameters():
        p.requires_grad_(False)
    rows = {r.name: r for r in handle.rows()}
    assert rows["model.layers.0.self_attn.q_proj"].note == "frozen weight: nothing is kept"
    with track_kept(model) as kept:
        model(**TEXT)
    assert kept.total == 0
    for p in model.parameters():
        p.requires_grad_(True)
    assert len(gradients(model, **TEXT)) == len(list(model.parameters()))


def test_summary_folds_blocks_and_totals() -> None:
    handle = prac.compress(build("llama"), PAPER)
    text = handle.summary()
    assert f"model.layers.[0-{LAYERS - 1}].self_attn.q_proj ×{LAYERS}" in text
    assert "shares the Z of q_proj" in text
    rows = handle.rows()
    total = sum(r.after for r in rows if r.compressed)
    assert f"→ {total:,}" in text


def test_repr_shows_ranks() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    assert "kept=9+9 of 32" in repr(model.model.layers[0].self_attn.q_proj)


def test_average_over_draws_approaches_the_exact_gradient() -> None:
    """Averaging over seeds brings the linear layers' gradients closer: the estimate is not just any noise."""
    plain = build("llama")
    exact = gradients(plain, **TEXT)
    config = PAPER.replace(norm=None, activation=None)
    total: dict[str, torch.Tensor] = {}
    single = 0.0
    for seed in range(24):
        model = build("llama")
        prac.compress(model, config.replace(seed=seed))
        got = gradients(model, **TEXT)
        total = {n: total.get(n, 0) + g / 24 for n, g in got.items()}
        single = relative(got["model.layers.1.mlp.down_proj.weight"], exact["model.layers.1.mlp.down_proj.weight"])
    averaged = relative(total["model.layers.1.mlp.down_proj.weight"], exact["model.layers.1.mlp.down_proj.weight"])
    assert averaged < 0.35 * single


def test_what_is_said_under_the_table() -> None:
    model, batch = build("llama"), FAMILIES["llama"][1]
    model.model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"exclude='model.layer\.\*' names no module.*'model.layers"):
        handle = prac.compress(model, "lean", include="*", exclude="model.layer.*")
    assert "Parts are frozen" in handle.summary()
    model(**batch).logits.sum().backward()
    assert "Parts are frozen" not in handle.summary()
    model.requires_grad_(True)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
        layer.more = nn.Linear(N, N)
    with pytest.warns(UserWarning, match=r"act_fn was changed.*what lies between its layers stays in full"):
        model(**batch).logits.sum().backward()
    said = handle.summary()
    assert "4 modules were added or changed since" in said and "2 layers go their own way" in said
    mlp = next(row for row in handle.rows() if row.name == "model.layers.0.mlp")
    assert (mlp.rank, mlp.before, mlp.after) == ("in full", None, None)
