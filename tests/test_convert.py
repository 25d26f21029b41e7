"""``compress`` and its handle: what a user can ask, and what goes wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gradients, loss, relative
from models import IDS, LAYERS, TEXT, build
from torch import nn
from torch.utils.checkpoint import checkpoint

import prac
from prac.layers import Compressed
from prac.memory import track_kept

PAPER = prac.PRESETS["paper"].replace(min_width=8)
BATCH = {"input_ids": IDS, "labels": IDS}


def compressed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Compressed)}


def train(model: nn.Module, steps: int, lr: float = 0.05, micro: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        for _ in range(micro):
            value = model(**BATCH).loss
            value.backward()
        losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# --- choosing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(include="*.q_proj"), {f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)}),
        (dict(include=["model.norm", "lm_head"]), {"model.norm", "lm_head"}),
        (dict(include=lambda module, name: name.endswith(".1.mlp.down_proj")), {"model.layers.1.mlp.down_proj"}),
        (
            dict(include="model.layers.0.*", exclude=["*norm", "*mlp*", "*.[qkv]_proj"]),
            {"model.layers.0.self_attn.o_proj"},
        ),
    ],
)
def test_include_and_exclude(kwargs: dict[str, Any], expected: set[str]) -> None:
    model = build("llama")
    prac.compress(model, PAPER, **kwargs)
    assert compressed_names(model) == expected


def test_kinds_can_be_left_alone() -> None:
    model = build("llama")
    handle = prac.compress(model, PAPER.replace(norm=None, activation=None))
    kinds = {m.kind for m in model.modules() if isinstance(m, Compressed)}
    assert kinds == {"linear"}
    assert {r.note for r in handle.rows() if "norm" in r.name} == {"the config leaves norm layers alone"}


def test_presets_by_name() -> None:
    model = build("llama")
    handle = prac.compress(model, "finetune", include="*.q_proj")
    assert handle.config is prac.PRESETS["finetune"]


# --- bad input ---------------------------------------------------------------------------------


def test_compress_twice() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    with pytest.raises(ValueError, match=r"compressed already; call handle\.restore"):
        prac.compress(model, PAPER)


@pytest.mark.parametrize(
    ("model", "kwargs", "word"),
    [
        (lambda: nn.Conv2d(3, 3, 3), {}, "nothing to compress in this Conv2d: no known layer"),
        (lambda: build("llama"), dict(exclude="*"), "nothing to compress in this LlamaForCausalLM: excluded"),
        (lambda: build("llama"), dict(include="decoder.*"), "not included"),
        (lambda: build("llama"), dict(config="papre"), "unknown preset 'papre'"),
        (
            lambda: build("llama"),
            dict(config=PAPER.replace(linear=prac.Rank(33, 0))),
            "model.layers.0.self_attn.q_proj: r1",
        ),
    ],
)
def test_refused_and_unchanged(model: Callable[[], nn.Module], kwargs: dict[str, Any], word: str) -> None:
    model = model()
    with pytest.raises(ValueError, match=word):
        prac.compress(model, **{"config": PAPER, **kwargs})
    assert not compressed_names(model)


def test_too_few_tokens_names_the_layer() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.input_layernorm: .* 2 tokens cannot span .* r1 = 6"):
        model(input_ids=IDS[:1, :2])


def test_nan_at_the_first_refresh() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"input_layernorm: cannot make the first subspace: .*NaN"):
        model(input_ids=torch.full_like(IDS, 5))


def test_forward_replaced_on_the_instance_is_reported() -> None:
    """As accelerate's hooks do: a class's forward would never be called."""
    model = build("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    rows = {r.name: r for r in prac.compress(model, PAPER).rows()}
    assert "replaced on the instance" in rows["model.layers.0.self_attn.q_proj"].note


def test_linear_subclass_with_its_own_forward_is_reported() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(40, 40), Quantised(40, 40), nn.Linear(40, 3))
    rows = {r.name: r for r in prac.compress(model, example=torch.zeros(8, 5, 40)).rows()}
    assert rows["0"].compressed
    assert "forward of its own" in rows["1"].note
    assert rows["2"].note == "output head"


def test_a_norm_that_is_no_rms_norm_is_reported() -> None:
    class CubicNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / x.abs().pow(3).mean(-1, keepdim=True).pow(1 / 3)

    rows = {r.name: r for r in prac.compress(nn.Sequential(CubicNorm(), nn.Linear(40, 40)), include="*").rows()}
    assert rows["0"].note == "a norm, but its output is not that of an RMSNorm"


def test_a_gated_mlp_of_zeros_is_not_guessed_at() -> None:
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    rows = {r.name: r for r in prac.compress(model, PAPER).rows()}
    assert "do not tell the gate" in rows["model.layers.0.mlp"].note
    assert rows["model.layers.0.mlp.act_fn"].compressed, "then its SiLU is compressed by itself"
    assert rows["model.layers.1.mlp"].compressed


def test_pickling_is_not_silently_wrong() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(model)


# --- the clock in real loops ------------------------------------------------------------------------


def refreshes(model: nn.Module) -> set[int]:
    return {s.refreshes for m in model.modules() if isinstance(m, Compressed) for s in m.subspaces.values()}


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
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
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
    assert next(m for m in twin.modules() if isinstance(m, Compressed)).subspaces["x"].clock.step == 5
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


# --- the handle -----------------------------------------------------------------------------------------


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
    tail = energy[layer.subspaces["x"].r1 :].sum() / energy.sum()
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
    assert "rank=9+9" in repr(model.model.layers[0].self_attn.q_proj)


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
