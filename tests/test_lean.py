"""The default preset and its neighbours in training loops: precision, recomputation, hooks, strangers, bytes."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import gradients, relative
from models import BATCH, IDS, TEXT, build, train
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import prac
from prac.lab.methods.peers import checkpoint_blocks
from prac.memory import track_kept

LEAN = prac.PRESETS["lean"].replace(min_width=8)
SMALL = prac.PRESETS["small"].replace(min_width=8)
FAST = prac.PRESETS["fast"].replace(min_width=8, group=prac.Rank(0.2, 0.2))
FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
presets = pytest.mark.parametrize("config", [LEAN, SMALL, FAST], ids=["lean", "small", "fast"])


def together(model: nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten().float() for g in gradients(model, **batch).values()])


def test_lean_is_the_default() -> None:
    assert prac.compress(build("llama")).config == prac.PRESETS["lean"]


@presets
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_falls(family: str, config: prac.Config) -> None:
    model = build(family)
    prac.compress(model, config)
    losses = train(model, 40, lr=0.01)
    assert losses[-1] < losses[0] - 1.0


@presets
def test_runs_repeat_to_the_bit(config: prac.Config) -> None:
    def run(seed: int) -> list[float]:
        model = build("llama")
        prac.compress(model, config.replace(seed=seed))
        return train(model, 6, micro=2)

    assert run(0) == run(0)
    assert run(0) != run(1)


@presets
def test_resume_is_exact(config: prac.Config) -> None:
    """State saved after three steps and loaded into a new process' worth of objects: the same next gradients."""
    model = build("llama")
    handle = prac.compress(model, config)
    train(model, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(handle.state_dict())
    expected = gradients(model, **BATCH)
    resumed = build("llama", seed=1)
    other = prac.compress(resumed, config)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    got = gradients(resumed, **BATCH)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bf16_autocast(family: str) -> None:
    """As close to plain autocast as bf16 and 4 bits allow, gradients in the parameters' dtype."""
    model = build(family)
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(together(model, **TEXT), together(plain, **TEXT)) < 0.03
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@presets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(config: prac.Config, dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    prac.compress(model, config)
    model(**BATCH).loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant: bool) -> None:
    """Exact where nothing is rounded; and nothing of a block is kept but its input."""
    models = [build("llama"), build("llama")]
    for model in models:
        prac.compress(model, EXACT)
    checkpoint_blocks(models[1], reentrant=reentrant)
    plain, recomputed = (gradients(m, **BATCH) for m in models)
    assert all(relative(recomputed[n], plain[n]) < 1e-5 for n in plain)
    with track_kept(models[1]) as kept:
        models[1](**BATCH)
    assert not any(bytes for name, bytes in kept.by_module.items() if "proj" in name)


def test_a_hook_on_a_layer_is_not_passed_over() -> None:
    """Layers that somebody hooked on to are called one by one, and the gradients are the same."""
    models = [build("llama"), build("llama")]
    seen: list[str] = []
    for model in models:
        prac.compress(model, EXACT)
    block = models[1].model.layers[0]
    for layer in (block.self_attn.k_proj, block.mlp.down_proj):
        layer.register_forward_hook(lambda module, args, output: seen.append("called"))
    plain, hooked = (gradients(m, **BATCH) for m in models)
    assert len(seen) == 2
    assert all(relative(hooked[n], plain[n]) < 1e-5 for n in plain)


def test_a_stranger_who_reads_the_norm_gets_its_gradient() -> None:
    """A loss on a norm's output, which the probe never saw: nothing is lost."""
    models = [build("llama"), build("llama")]
    prac.compress(models[0], EXACT)
    found = []
    for model in models:
        read: list[torch.Tensor] = []
        norm = model.model.layers[1].input_layernorm
        hook = norm.register_forward_hook(lambda module, args, output, read=read: read.append(output))
        model.zero_grad()
        loss = model(**BATCH).loss
        (loss + read[0].square().mean()).backward()
        hook.remove()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(relative(found[0][n], found[1][n]) < 1e-4 for n in found[1])


def test_frozen_weights_and_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=8, target_modules="all-linear"))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT)
    got, expected = gradients(model, **BATCH), gradients(plain, **BATCH)
    assert got.keys() == expected.keys()
    assert all(relative(got[n], expected[n]) < 1e-4 for n in expected)


def test_lean_keeps_fewer_bytes_under_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=8, target_modules="all-linear"))
    plain = copy.deepcopy(model)
    prac.compress(model, LEAN)
    totals = []
    for m in (model, plain):
        with track_kept(m) as kept:
            m(**BATCH)
        totals.append(kept.total)
    assert totals[0] < 0.75 * totals[1]


def test_a_copy_and_a_restored_model() -> None:
    model = build("llama")
    handle = prac.compress(model, LEAN)
    twin = copy.deepcopy(model)
    train(twin, 2)
    assert handle.step == 0
    layers = twin.model.layers[0].self_attn
    theirs = model.model.layers[0].self_attn
    assert layers.q_proj.estimators["x"] is layers.k_proj.estimators["x"] is not theirs.q_proj.estimators["x"]
    plain = build("llama")
    handle.restore()
    expected = gradients(plain, **BATCH)
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model, **BATCH).items())


def test_without_an_example_the_first_batch_is_one() -> None:
    model, informed = build("plain"), build("plain")
    handle = prac.compress(model, LEAN, exclude=["5", "4"])
    assert "has no example" in handle.summary()
    model(IDS)
    expected = prac.compress(informed, LEAN, exclude=["5", "4"], example=IDS)
    assert handle.summary() == expected.summary()
    with track_kept(model) as kept:
        model(IDS).sum().backward()
    assert kept.by_module.get("1.wq", 0) == kept.by_module.get("1.wk", 0) == 0
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss = model(IDS).square().sum()
        torch.autograd.grad(loss, model[1].wq.weight, create_graph=True)


def test_the_summary_says_who_has_what_from_whom() -> None:
    handle = prac.compress(build("llama"), LEAN.replace(attention_bits=8))
    text = handle.summary()
    for line in ("from x̂ of input_layernorm", "from x̂ of post_attention_layernorm", "from g and u of mlp"):
        assert line in text
    assert "attention's q, k, v" not in text  # of what stays in full


def test_the_final_norm_does_not_hold_its_input() -> None:
    # The head keeps the norm's output; what is noted on that must not keep the last hidden state alive as well.
    model = build("llama").train()
    prac.compress(model, LEAN)
    seen: list[StorageWeakRef] = []
    model.model.norm.register_forward_pre_hook(
        lambda module, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
    )
    logits = model(**TEXT).logits
    assert seen[0].expired()
    logits.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_xhat_is_decoded_once_for_all_that_read_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a block: for q, k and v, and for the MLP. And nothing of it is left when backward is done."""
    from prac.ops import shared_norm

    decoded: list[weakref.ref[torch.Tensor]] = []
    read = shared_norm.kernels.read_normalised

    def counted(*args):
        y = read(*args)
        decoded.append(weakref.ref(y))
        return y

    monkeypatch.setattr(shared_norm.kernels, "read_normalised", counted)
    model = build(family)
    prac.compress(model, LEAN)
    out = model(**BATCH)
    out.loss.backward(retain_graph=True)
    blocks = model.config.num_hidden_layers
    assert len(decoded) == 2 * blocks
    # A pass that stops short of the norms: their own backward does not come by.
    last = [p for name, p in model.named_parameters() if "k_proj" in name or "c_attn.weight" in name]
    torch.autograd.grad(out.loss, last, retain_graph=True)
    assert len(decoded) > 2 * blocks and not any(y() is not None for y in decoded)
