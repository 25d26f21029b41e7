"""The preset `paper`: what it leaves alone and why, and which width a rank of the hidden size is of."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, M, N, build
from test_families import batch_of
from torch import nn

import prac
from prac.estimators.subspace import Subspace
from prac.layers import Compressed

NORMS = {"qwen3": 4}  # in a block, where they are not two

# The hidden size that the rank of an activation is of, its width, and the norm that runs last.
AS_THE_PAPER = {
    "llama": ("model.layers.1.mlp.act_fn", "model.norm"),
    "qwen3": ("model.layers.1.mlp.act_fn", "model.norm"),
    "phi3": ("model.layers.1.mlp.activation_fn", "model.norm"),
    "gpt2": ("transformer.h.1.mlp.act", "transformer.ln_f"),
    "vit": ("vit.layers.1.mlp.activation_fn", "vit.layernorm"),
}


@pytest.mark.parametrize("family", AS_THE_PAPER)
def test_the_papers_policy(family: str) -> None:
    """Products in full, activations at a rank of the hidden size, the last norm left alone; each with its reason."""
    model = build(family)
    config = prac.PRESETS["paper"].replace(min_width=8)
    rows = {row.name: row for row in prac.compress(model, config, example=batch_of(family)).rows()}
    names = [name for name, row in rows.items() if row.what == "activation"]
    activation, last = AS_THE_PAPER[family]
    fused = family == "phi3"  # there is nothing to save in one half of a tensor whose other half is kept
    assert len(names) == (0 if fused else LAYERS)
    assert ("in one tensor with the product's other factor" in rows[activation].note) == fused
    assert all(rows[name].rank == f"{int(0.4 * N)}+0 of {M}" for name in names)
    assert rows[last].note == "the norm that runs last stays in full, as the config has it"
    assert sum(row.what == "norm" for row in rows.values()) == NORMS.get(family, 2) * LAYERS
    products = [row.note for row in rows.values() if "gated products" in row.note]
    assert len(products) == (LAYERS if family in ("llama", "qwen3", "phi3") else 0)
    model(**batch_of(family))
    grown = {s.name for s in _subspaces(model) if s.growth}
    assert grown == {name for name, row in rows.items() if row.what in ("norm", "activation")}
    assert all(s.renormalise for s in _subspaces(model))


def _subspaces(model: nn.Module) -> set[Subspace]:
    found = (e for m in model.modules() if isinstance(m, Compressed) for e in m.estimators.values())
    return {e for e in found if isinstance(e, Subspace)}


def test_the_hidden_size_behind_adapters_and_without_a_linear_layer() -> None:
    """LoRA's second factor runs last before an activation, and is narrow; where nothing ran before, its own width."""
    from peft import LoraConfig, get_peft_model

    config = prac.PRESETS["paper"].replace(min_width=4)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    rows = prac.compress(model, config, example=batch_of("llama")).rows()
    assert {row.rank for row in rows if row.what == "activation"} == {f"{int(0.4 * N)}+0 of {M}"}
    model = nn.Sequential(nn.GELU(), nn.Linear(40, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 50), nn.GELU())
    rows = prac.compress(model, config, example=torch.randn(70, 40), include="*").rows()
    assert [row.rank for row in rows if row.what == "activation"] == ["16+0 of 40", "8+0 of 20", "8+0 of 50"]
    # The linear layer before, not the widest; also past a norm, and for an activation in a module of its own.
    model = nn.Sequential(nn.Linear(60, 20), nn.Linear(20, 50), nn.LayerNorm(50), nn.Sequential(nn.GELU()))
    rows = prac.compress(model, config, example=torch.randn(70, 60), include="*").rows()
    assert [row.rank for row in rows if row.what == "activation"] == ["8+0 of 50"]


def test_the_last_norm_is_that_of_training_and_evaluation_together() -> None:
    """Modules that training left out have their place; they are not the last because they were seen later."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2, self.last = (nn.LayerNorm(64) for _ in range(3))
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(self.n1(x))
            if not self.training:
                x = x + self.b(self.n2(x))
            return self.head(self.last(x)).mean()

    rows = {r.name: r for r in prac.compress(Skipping().train(), "paper", example=torch.randn(8, 8, 64)).rows()}
    assert [name for name, row in rows.items() if "runs last" in row.note] == ["last"]
    assert rows["n2"].what == "norm"


def test_the_last_norm_may_be_named_all_the_same() -> None:
    model = build("llama")
    config = prac.PRESETS["paper"].replace(min_width=8, layers={"model.norm": prac.Bits(8)})
    rows = {row.name: row for row in prac.compress(model, config, example=batch_of("llama")).rows()}
    assert rows["model.norm"].rank == "8 bits"


def test_rows_of_a_model_without_parameters() -> None:
    (row,) = prac.compress(nn.Sequential(nn.GELU()), "paper").rows()
    assert row.what == "activation"
