"""``config.layers``: single layers that keep theirs otherwise than their kind does."""

from __future__ import annotations

import json

import pytest
from models import BATCH, PAPER, build, train

import prac
from prac import Bits, Config, Rank
from prac.allocation import allocate
from prac.layers import Compressed

LEAN = prac.PRESETS["lean"].replace(min_width=8)
FAST = prac.PRESETS["fast"].replace(min_width=8)
LINEAR = PAPER.replace(norm=None, activation=None)


def test_layers_survive_json() -> None:
    found = allocate(build("llama"), BATCH, FAST, FAST)
    mixed = found.config.replace(layers=found.config.layers | {"r1": Rank(3, 4, bits=Bits(8)), "bits": Bits(2, 16)})
    assert Config.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert hash(mixed) is not None
    old = {name: value for name, value in FAST.to_dict().items() if name != "layers"}
    assert Config.from_dict(old) == FAST


def test_layers_override_their_kind() -> None:
    model = build("llama")
    names = {"model.layers.0.self_attn.q_proj": Rank(5, 6), "model.layers.1.mlp.down_proj": Bits(8)}
    rows = {row.name: row for row in prac.compress(model, LINEAR.replace(layers=names)).rows()}
    assert rows["model.layers.0.self_attn.q_proj"].rank == rows["model.layers.0.self_attn.v_proj"].rank == "5+6 of 32"
    assert rows["model.layers.1.self_attn.q_proj"].rank == "9+9 of 32"
    assert rows["model.layers.1.mlp.down_proj"].rank == "8 bits"
    model = build("llama")
    rows = {row.name: row for row in prac.compress(model, LINEAR.replace(linear=None, layers=names)).rows()}
    assert {name for name, row in rows.items() if row.compressed} == set(names)
    model = build("llama")
    norm = "model.layers.1.input_layernorm"
    rows = {row.name: row for row in prac.compress(model, LEAN.replace(layers={norm: Rank(0.25, 0.25)})).rows()}
    assert rows[norm].rank == "8+8 of 32"
    assert rows["model.layers.1.self_attn.q_proj"].after == 16 + 4  # its output, for the exact scalar
    assert rows["model.layers.0.self_attn.q_proj"].after == 0
    train(model, 2)


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (LEAN, "model.layers.7.nowhere", "no layer that is compressed"),
        (LEAN, "model.layers.0.self_attn.q_proj", "has its input from x̂ of model.layers.0.input_layernorm"),
        (LEAN, "model.layers.0.mlp", "activation, kept as its kind is"),
        (LEAN.replace(attention_bits=8), "model.layers.0.self_attn", "attention, kept as its kind is"),
        (LINEAR, "model.layers.0.self_attn.k_proj", "shares the input of model.layers.0.self_attn.q_proj"),
    ],
)
def test_layers_that_keep_nothing_are_refused(config: Config, name: str, why: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="keeps no tensor of its own") as error:
        prac.compress(model, config.replace(layers={name: Bits(8)}))
    assert f"{name} ({why})" in str(error.value)
    assert not any(isinstance(module, Compressed) for module in model.modules())


def test_layers_are_ranks_or_bits() -> None:
    with pytest.raises(ValueError, match="Rank, Bits or Factors for each name, got 4 for 'a'"):
        Config(layers={"a": 4})
    with pytest.raises(ValueError, match="q_proj: r1 \\+ r2 = 60 \\+ 0"):
        prac.compress(build("llama"), LINEAR.replace(layers={"model.layers.0.self_attn.q_proj": Rank(60, 0)}))
