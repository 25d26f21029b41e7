"""``compress``: what a user can choose, and what goes wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import IDS, LAYERS, PAPER, build, compressed_names
from torch import nn

import prac
from prac.layers import Compressed
from prac.runtime import fake

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


@pytest.mark.parametrize("filter", [3, [3], [b"mlp"]])
def test_what_is_no_filter_is_named(filter: Any) -> None:
    for what in ("include", "exclude"):
        with pytest.raises(TypeError, match=f"{what} must be a pattern"):
            prac.compress(build("llama"), PAPER, **{what: filter})
    assert prac.compress(build("llama"), PAPER, include={"*.mlp.*"}).rows()


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
    assert "weights of zero" in rows["model.layers.0.mlp"].note
    assert rows["model.layers.0.mlp.act_fn"].compressed, "then its SiLU is compressed by itself"
    assert rows["model.layers.1.mlp"].compressed


def test_pickling_is_not_silently_wrong() -> None:
    model = build("llama")
    prac.compress(model, PAPER)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(model)


@pytest.mark.parametrize("config", ["lean", "paper"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "vit"])
def test_weights_without_numbers_are_recognised_as_well(family: str, config: str) -> None:
    chosen = prac.PRESETS[config].replace(min_width=8)
    real, meta = build(family), build(family).to("meta")
    expected = str(prac.compress(real, chosen).summary())
    assert str(prac.compress(meta, chosen).summary()) == expected
    with fake.faked(build(family)) as (twin,):
        assert str(prac.compress(twin, chosen).summary()) == expected
