"""``compress`` on every supported family: same outputs, right gradients, nothing skipped in silence."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import gradients, relative
from models import FAMILIES, LAYERS, PAPER, build
from torch import nn

import prac
from prac.layers import Compressed
from prac.memory import track_kept

LOSSLESS = prac.Config(
    linear=prac.Rank(1.0, 0.0), norm=prac.Rank(1.0, 0.0), activation=prac.Rank(1.0, 0.0), min_width=1
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_of(family: str) -> dict[str, Any]:
    return FAMILIES[family][1]


def compress(model: nn.Module, family: str, config: prac.Config = PAPER, **kwargs: Any) -> prac.Handle:
    """As a user would: Hugging Face models need no example, others get one."""
    if family in ("encoder", "plain"):
        kwargs.setdefault("example", batch_of(family))
    return prac.compress(model, config, **kwargs)


FULL = prac.Bits(32)
WAYS = {
    "paper": LOSSLESS,
    "groups": prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1),
    # c from outputs in few bits would not be lossless; see tests/test_groups.py for that.
    "groups, activations alone": prac.Config(linear=FULL, norm=FULL, activation=None, group=FULL, min_width=1),
}


@pytest.mark.parametrize("way", WAYS)
@every_family
def test_gradients_equal_autograds_when_nothing_is_lost(family: str, way: str) -> None:
    """R1 = n for every layer, or 32 bits: float32 accuracy for every parameter."""
    model = build(family)
    plain = copy.deepcopy(model)
    compress(model, family, WAYS[way])
    expected = gradients(plain, **batch_of(family))
    got = gradients(model, **batch_of(family))
    assert got.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    for name in expected:
        # Some gradients are zero but for rounding (a key's bias, say): compare on the common scale too.
        small = (got[name] - expected[name]).abs().max().item() < 1e-6 * scale
        assert small or relative(got[name], expected[name]) < 2e-4, name


@every_family
def test_lean_has_the_same_outputs_and_nearly_the_same_gradients(family: str) -> None:
    """Outputs to float32 rounding, in eval mode to the bit; gradients within the rounding error of 8 bits."""
    model = build(family)
    plain = copy.deepcopy(model)
    eight = prac.Bits(8)
    compress(model, family, prac.Config(linear=eight, norm=eight, activation=eight, group=eight, min_width=1))
    outputs = [m(**batch_of(family)) for m in (model, plain)]
    first = [o if isinstance(o, torch.Tensor) else o.logits for o in outputs]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
    got, expected = (
        torch.cat([g.flatten() for g in gradients(m, **batch_of(family)).values()]) for m in (model, plain)
    )
    assert 1e-5 < relative(got, expected) < 0.02
    model.eval(), plain.eval()
    outputs = [m(**batch_of(family)) for m in (model, plain)]
    assert torch.equal(*(o if isinstance(o, torch.Tensor) else o.logits for o in outputs))


# The norms of a block that linear layers alone read, with those; and norms that something else reads as well.
GROUPS: dict[str, tuple[dict[str, set[str]], dict[str, set[str]]]] = {
    "llama": ({"input_layernorm": {"q_proj", "k_proj", "v_proj"},
               "post_attention_layernorm": {"gate_proj", "up_proj"}}, {}),
    "gemma2": ({"input_layernorm": {"q_proj", "k_proj", "v_proj"},
                "pre_feedforward_layernorm": {"gate_proj", "up_proj"}}, {}),
    "phi3": ({"input_layernorm": {"qkv_proj"}, "post_attention_layernorm": {"gate_up_proj"}}, {}),
    "gpt2": ({"ln_1": {"c_attn"}, "ln_2": {"c_fc"}}, {}),
    "vit": ({"layernorm_before": {"q_proj", "k_proj", "v_proj"}, "layernorm_after": {"fc1"}}, {}),
    "bert": ({}, {"attention.output.LayerNorm": {"dense"}, "0.output.LayerNorm": {"query", "key", "value"},
                  "embeddings.LayerNorm": {"query", "key", "value"}}),
    "plain": ({"norm1": {"wq", "wk", "wv"}, "norm2": {"w1", "w3"}}, {}),
}  # fmt: skip
GROUPS |= {"mistral": GROUPS["llama"], "qwen2": GROUPS["llama"], "qwen3": GROUPS["llama"]}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_are_found_by_looking(family: str) -> None:
    """A rank for x̂ goes to the groups, and 8 bits to every other norm."""
    config = prac.Config(
        group=prac.Rank(0.3, 0.3), linear=prac.Bits(8), norm=prac.Bits(8), activation=prac.Bits(8), min_width=1
    )
    rows = compress(build(family), family, config).rows()
    ranked = {row.name for row in rows if row.what == "norm" and "of" in row.rank}
    rounded = {row.name for row in rows if row.what == "norm" and row.rank == "8 bits"}
    groups, others = GROUPS[family]
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.note.startswith("from x̂ of "):
            found.setdefault(row.note.removeprefix("from x̂ of "), set()).add(row.name.rpartition(".")[2])
    assert len(ranked) == LAYERS * len(groups)
    assert {name.rpartition(".")[2] for name in ranked} == set(groups)
    assert all(found[norm] == readers for norm, readers in groups.items())
    for norm, readers in others.items():
        assert any(name.endswith(norm) for name in rounded)
        assert any(norm.endswith(seen) and readers == found[seen] for seen in found), (norm, found)


@every_family
def test_outputs_are_the_same_to_the_bit(family: str) -> None:
    model = build(family)
    plain = copy.deepcopy(model)
    compress(model, family)
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        ours, theirs = model(**batch_of(family)), plain(**batch_of(family))
        first = [o if isinstance(o, torch.Tensor) else o.logits for o in (ours, theirs)]
        assert torch.equal(*first)


@every_family
def test_state_dict_and_restore(family: str) -> None:
    """Same keys and values, loads both ways; restore gives every module its class and attributes back."""
    model = build(family)
    plain = copy.deepcopy(model)
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    handle = compress(model, family)
    gradients(model, **batch_of(family))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    model.load_state_dict(theirs), plain.load_state_dict(ours)
    assert handle.restore() is model
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    expected = gradients(plain, **batch_of(family))
    assert all(torch.equal(g, expected[n]) for n, g in gradients(model, **batch_of(family)).items())
    compress(model, family)  # and again


@every_family
def test_nothing_is_skipped_in_silence(family: str) -> None:
    """Every module that has parameters of its own, or is a leaf, is compressed or has a reason."""
    model = build(family)
    handle = compress(model, family)
    rows = {row.name: row for row in handle.rows()}
    for name, module in model.named_modules():
        empty = isinstance(module, nn.Identity | nn.ModuleDict | nn.ParameterDict)
        leaf = not any(module.children()) and not empty
        if leaf or list(module.parameters(recurse=False)):
            assert name in rows, name
            assert rows[name].compressed or rows[name].note, name
            assert rows[name].compressed == isinstance(module, Compressed)
    text = handle.summary()
    assert f"{sum(r.compressed for r in rows.values())} layers compressed" in text


# What is compressed in one of the LAYERS blocks, by kind, and how many different subspaces that makes.
EXPECTED = {
    "llama": (dict(linear=7, norm=2, activation=1), 4 + 2 + 2, 1),
    "mistral": (dict(linear=7, norm=2, activation=1), 4 + 2 + 2, 1),
    "qwen2": (dict(linear=7, norm=2, activation=1), 4 + 2 + 2, 1),
    "qwen3": (dict(linear=7, norm=4, activation=1), 4 + 4 + 2, 1),
    "gemma2": (dict(linear=7, norm=4, activation=1), 4 + 4 + 2, 1),
    "phi3": (dict(linear=4, norm=2, activation=1), 4 + 2 + 2, 1),
    "gpt2": (dict(linear=4, norm=2, activation=1), 4 + 2 + 1, 1),
    "bert": (dict(linear=6, norm=2, activation=1), 4 + 2 + 1, 1),
    "vit": (dict(linear=6, norm=2, activation=1), 4 + 2 + 1, 1),
    "encoder": (dict(linear=2, norm=2, activation=1), 2 + 2 + 1, 0),
    "plain": (dict(linear=7, norm=2, activation=1), 4 + 2 + 2, 1),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_found(family: str) -> None:
    """Kinds and numbers of layers; q, k, v and gate, up share; the head stays; norms outside blocks count."""
    model = build(family)
    compress(model, family)
    layers = [m for m in model.modules() if isinstance(m, Compressed)]
    kinds, subspaces, outer_norms = EXPECTED[family]
    expected = Counter({kind: LAYERS * count for kind, count in kinds.items()}) + Counter(norm=outer_norms)
    assert Counter(layer.kind for layer in layers) == expected
    assert len({s for layer in layers for s in layer.estimators.values()}) == LAYERS * subspaces + outer_norms


def test_reasons() -> None:
    """The ones a user will ask about."""
    notes = {r.name: r.note for f in ("bert", "encoder", "llama") for r in compress(build(f), f).rows()}
    assert notes["classifier"] == notes["lm_head"] == "output head"
    assert notes["bert.pooler.dense"] == "sees one row per sample, not per token"
    assert "embedding" in notes["model.embed_tokens"]
    assert "out of reach" in notes["layers.0.self_attn"]
    assert "without calling it" in notes["layers.0.self_attn.out_proj"]
    assert notes["model.layers.1.mlp.act_fn"] == "runs inside its MLP"


@every_family
def test_bytes_kept_are_what_the_summary_says(family: str) -> None:
    """Measured on a real forward pass, module by module, to the byte."""
    model = build(family)
    rows = {r.name: r for r in compress(model, family).rows()}
    with track_kept(model) as kept:
        model(**batch_of(family))
    tokens = {"vit": 6 * 17}.get(family, 4 * 17)
    for name, row in rows.items():
        if row.compressed and "_norm" not in name:  # Qwen3's q_norm and k_norm see tokens × heads
            assert kept.by_module.get(name, 0) == tokens * row.after, name


@every_family
def test_nothing_is_kept_outside_training(family: str) -> None:
    """In eval mode with gradients, autograd keeps what it always would; without, nothing; P is never made."""
    model = build(family).eval()
    plain = copy.deepcopy(model)
    handle = compress(model, family)
    with track_kept(model) as ours:
        model(**batch_of(family))
    with track_kept(plain) as theirs:
        plain(**batch_of(family))
    assert ours.by_module == theirs.by_module
    with torch.no_grad(), track_kept(model.train()) as nothing:
        model(**batch_of(family))
    assert nothing.total == 0
    assert all(s.p_NR is None for s in handle.subspaces())


@every_family
def test_without_an_example_sharing_is_found_at_the_first_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_example, without = build(family), build(family)
    compress(with_example, family)
    monkeypatch.setattr("prac.convert.compress.example_for", lambda model: None)
    # Heads and poolers cannot be seen without one: they are left out by name.
    prac.compress(
        without,
        PAPER,
        exclude=lambda module, name: name.endswith("pooler.dense") or name in ("classifier", "lm_head", "4"),
    )
    with track_kept(with_example) as expected:
        with_example(**batch_of(family))
    with track_kept(without) as found:
        without(**batch_of(family))
    assert {k: v for k, v in found.by_module.items() if "lm_head" not in k} == {
        k: v for k, v in expected.by_module.items() if "lm_head" not in k
    }


def peft_llama(**kwargs: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], **kwargs))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide errors
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_peft_wrapped_llama() -> None:
    """Frozen weights are said to keep nothing, LoRA's A shares one Z between q and v, gradients are right."""
    model = peft_llama()
    plain = copy.deepcopy(model)
    handle = prac.compress(model, LOSSLESS)
    expected, got = (gradients(m, **batch_of("llama")) for m in (plain, model))
    assert got.keys() == expected.keys()
    assert len(got) == LAYERS * 6
    for name in expected:
        assert relative(got[name], expected[name]) < 2e-4, name
    handle.restore()

    rows = {r.name.removeprefix("base_model.model.model."): r for r in prac.compress(model, PAPER).rows()}
    assert rows["layers.0.self_attn.q_proj.base_layer"].note == "frozen weight: nothing is kept"
    assert rows["layers.0.self_attn.q_proj.lora_A.default"].compressed
    assert "shares the Z" in rows["layers.0.self_attn.v_proj.lora_A.default"].note
    assert rows["layers.0.mlp"].compressed, "the gated MLP is found through LoRA's wrappers"
    assert rows["layers.0.input_layernorm"].compressed
    for name, module in model.named_modules():
        if not any(module.children()) and not isinstance(module, nn.Identity | nn.ModuleDict | nn.ParameterDict):
            assert name.removeprefix("base_model.model.model.") in rows


def test_peft_keeps_fewer_bytes() -> None:
    model = peft_llama()
    plain = copy.deepcopy(model)
    prac.compress(model, PAPER)
    with track_kept(model) as ours:
        model(**batch_of("llama"))
    with track_kept(plain) as theirs:
        plain(**batch_of("llama"))
    assert ours.total < 0.75 * theirs.total
