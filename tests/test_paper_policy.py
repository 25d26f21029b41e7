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


class Gelus(nn.Module):
    """Two hidden layers, of these widths, with one GELU for both or each its own."""

    def __init__(self, first: int, second: int, shared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, first), nn.Linear(first, 64)
        self.c, self.d = nn.Linear(64, second), nn.Linear(second, 64)
        self.act1 = nn.GELU()
        self.act2 = self.act1 if shared else nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.act2(self.c(self.b(self.act1(self.a(x))))))


@pytest.mark.parametrize("second", [256, 128])
@pytest.mark.parametrize("given", [True, False])
def test_one_activation_in_several_places_stays_in_full(second: int, given: bool) -> None:
    """Its basis would be of what it read first: wrong by many times more, and of another width at worst."""
    x = torch.randn(2, 80, 64)
    handle = prac.compress(model := Gelus(256, second, shared=True), "paper", **({"example": x} if given else {}))
    model(x).square().mean().backward()
    (row,) = [row for row in handle.rows() if row.module == "GELU"]
    assert row.note.startswith("runs 2 times in a pass") and not row.compressed
    rows = prac.compress(Gelus(256, second, shared=False), "paper", example=x, include="*").rows()
    assert len(rows) == 6 and all(row.compressed for row in rows)
    rows = prac.compress(Gelus(256, second, shared=True), "lean", example=x, include="*").rows()
    assert all(row.compressed for row in rows), "bits need no basis"


def test_the_norm_that_runs_last_may_have_run_before() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(64), nn.RMSNorm(64)
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(self.n1(x))
            return self.head(self.n1(x + self.b(self.n2(x))))

    rows = prac.compress(Again(), "paper", example=torch.randn(2, 64, 64)).rows()
    assert [row.name for row in rows if "runs last" in row.note] == ["n1"]


class Routed(nn.Module):
    """The first tokens go to one expert, the others to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(64, 64)
        self.often, self.rarely = (nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(2))

    def forward(self, x: torch.Tensor, rarely: int) -> torch.Tensor:
        x = self.inside(x)
        return torch.cat([self.rarely(x[:rarely]), self.often(x[rarely:])])


def test_an_expert_with_few_tokens_waits_in_full() -> None:
    """Its gradients are exact until it has seen enough for a basis; said once, and in the summary."""
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(90, 64, dtype=torch.float64)
    handle = prac.compress(model, "paper", example=(x, 0))
    with pytest.warns(UserWarning, match="rarely.0 stays in full until it sees more tokens: 5 tokens cannot") as told:
        model(x, 5).square().mean().backward()
    assert len(told) == 1
    found = [p.grad.clone() for p in model.rarely.parameters()]
    with handle.suspended():
        expected = torch.autograd.grad(model(x, 5).square().mean(), list(model.rarely.parameters()))
    torch.testing.assert_close(found, list(expected))
    rows = {row.name: row for row in handle.rows()}
    assert rows["rarely.0"].note == "in full until it sees 19 tokens at once"
    assert rows["rarely.0"].before == rows["rarely.0"].after == 64 * 8
    model(x, 60).square().mean().backward()
    rows = {row.name: row for row in handle.rows()}
    assert all(row.note == "" and row.after < row.before for name, row in rows.items() if name.startswith("rarely."))
    with pytest.raises(ValueError, match="5 tokens cannot span"):  # not for want of luck: no batch would do
        prac.compress(fresh := Routed(), "paper")
        fresh(torch.randn(5, 64), 0)


def test_what_attention_keeps_anyway_is_no_saving() -> None:
    """The paper compresses the input of W_o; torch's attention keeps that tensor, so it comes on top."""
    model = build("llama")
    rows = prac.compress(model, prac.PRESETS["paper"].replace(min_width=8), example=batch_of("llama")).rows()
    found = [row for row in rows if row.name.endswith("o_proj")]
    assert found and all(row.before == 0 < row.after and "comes on top" in row.note for row in found)
    assert all(row.before > 0 for row in rows if row.name.endswith("down_proj"))
