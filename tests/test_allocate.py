"""``prac.allocate``: never worse than uniform, as good as it says, and without a trace in the model."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import loss
from models import BATCH, FAMILIES, IDS, PAPER, VOCAB, build, train
from torch import Tensor, nn

import prac
from prac.allocation import allocate
from prac.config import Bits, Config, Factors, Rank
from prac.layers import Compressed

LEAN = prac.PRESETS["lean"].replace(min_width=8)
FAST = prac.PRESETS["fast"].replace(min_width=8)
LINEAR = PAPER.replace(norm=None, activation=None)


def batch_of(rows: int, length: int = 33) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def trained(steps: int = 8) -> nn.Module:
    model = build("llama")
    train(model, steps, lr=0.005)
    return model


def measure(model: nn.Module, config: Config, batch: dict[str, Tensor], draws: int) -> dict[str, float]:
    """The mean over draws of what a Monitor says of each layer's gradient."""
    sums: dict[str, float] = {}
    for seed in range(draws):
        handle = prac.compress(model, config.replace(seed=seed))
        with (monitor := prac.Monitor(handle, parts=1)):
            model(**batch).loss.backward()
        handle.restore()
        model.zero_grad()
        for layer in monitor.history[0].layers:
            sums[layer.name] = sums.get(layer.name, 0.0) + (layer.gradient_variance or 0.0) / draws
    return sums


def test_predicted_variance_of_linear_layers_is_what_a_monitor_measures() -> None:
    """Within a quarter over 12 draws, a tenth in the mean over layers: nothing but these layers is compressed."""
    model, batch = trained(), batch_of(16)
    found = allocate(model, batch, LINEAR, LINEAR, bits=(), rank_bits=(None,))
    alone = [d for d in found.decisions if d.name.endswith(("o_proj", "down_proj"))]  # one reader each
    assert len(alone) == 4
    for config, predicted in ((LINEAR, "uniform_variance"), (found.config, "variance")):
        seen = measure(model, config, batch, 12)
        ratios = [seen[d.name] / getattr(d, predicted) for d in alone]
        assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios
        assert 0.9 < sum(ratios) / 4 < 1.1, ratios


def test_numbers_of_bits_are_rotated_where_the_config_has_them_so() -> None:
    model, batch = trained(), batch_of(4)
    for budget in ("fast", 2000):
        found = allocate(model, batch, budget, "lean", rank_bits=(), bits=(2, 4, 6, 8))
        assert all(d.keep.rotate and d.keep.group == 32 for d in found.decisions), found


@pytest.mark.parametrize("bits", [(2, 4, 8), ()])
def test_predicted_variance_of_norm_groups_is_near_what_a_monitor_measures(bits: tuple[int, ...]) -> None:
    """Within a factor of 1.6: what is measured has the noise from the norms above in it."""
    model, batch = trained(), batch_of(16)
    rank = FAST.replace(group=Rank(0.3, 0.3, bits=Bits(8)), activation=Bits(32), linear=Bits(32), norm=Bits(32))
    found = allocate(model, batch, rank.replace(group=Bits(4)) if bits else rank, rank, bits=bits)
    seen = measure(model, found.config, batch, 6)
    for d in found.decisions:
        if d.name.endswith("input_layernorm"):
            parts = [seen[d.name.replace("input_layernorm", f"self_attn.{p}_proj")] for p in "qkv"]
            assert min(parts) / 1.6 < d.variance < max(parts) * 1.6


@pytest.mark.parametrize(
    ("policy", "config", "how"),
    [
        (FAST, FAST, {"bits": ()}),
        (FAST, FAST, {"bits": (), "relative": True}),
        (FAST, FAST, {"bits": (), "held_out": True}),
        (FAST, LEAN, {}),
        (LEAN, LEAN, {"rank_bits": ()}),
        (LEAN.replace(group=Rank(0.3, 0.3, bits=Bits(8))), LEAN, {"bits": (), "rank_bits": (8,)}),
        (LINEAR, LINEAR, {"bits": (), "rank_bits": (None,)}),
        (PAPER, PAPER, {"rank_bits": (), "relative": True}),
        (LEAN.replace(attention_bits=8), LEAN.replace(attention_bits=8), {"bits": (2, Bits(4, 16), 4, 8)}),
    ],
)
def test_never_more_bytes_nor_more_variance_than_the_uniform_policy(policy, config, how) -> None:
    model = build("llama")
    found = allocate(model, BATCH, policy, config, **how)
    assert found.bytes_per_token <= found.budget == found.uniform_bytes_per_token
    assert found.uniform_variance is not None
    assert found.variance <= found.uniform_variance * (1 + 1e-12)
    assert all(d.uniform is not None and d.variance >= 0 for d in found.decisions)
    if not how.get("bits", (1,)):
        assert all(isinstance(d.keep, Rank) for d in found.decisions)
        assert found.variance < 0.9 * found.uniform_variance
    handle = prac.compress(model, found.config)
    assert sum(row.after or 0 for row in handle.rows()) == found.bytes_per_token
    labels = {row.name: row.rank for row in handle.rows()}
    for d in found.decisions:
        expected = "{}+{} of".format(*d.keep.resolve(32)) if isinstance(d.keep, Rank) else f"{d.keep.bits} bits"
        assert labels[d.name].startswith(expected) or "down" in d.name
    assert f"{found.bytes_per_token:,} (" in handle.summary()
    train(model, 2)


@pytest.mark.parametrize("family", ["gpt2", "bert", "phi3", "vit", "t5", "encoder", "plain", "gemma2"])
def test_other_models(family: str) -> None:
    model, batch = build(family), FAMILIES[family][1]
    found = allocate(model, batch, LEAN, LEAN, objective=loss)
    assert found.variance <= found.uniform_variance
    prac.compress(model, found.config, example=batch)


def test_a_number_of_bytes() -> None:
    model = build("llama")
    least = allocate(model, BATCH, 10**6, LEAN, bits=(2,), rank_bits=()).bytes_per_token
    variances = []
    for budget in (least, least + 40, least + 200, 10**6):
        found = allocate(model, BATCH, budget, LEAN, rank_bits=())
        assert found.bytes_per_token <= budget == found.budget
        assert found.uniform_bytes_per_token == allocate(model, BATCH, LEAN, LEAN, rank_bits=()).budget
        variances.append(found.variance)
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < 1e-4


def test_a_policy_that_keeps_other_tensors_gives_its_bytes_alone() -> None:
    found = allocate(build("llama"), BATCH, PAPER, LEAN)
    assert found.bytes_per_token <= found.budget == found.uniform_bytes_per_token
    assert found.uniform_variance is None
    assert found.decisions[0].uniform is None
    assert "uniform policy" not in str(found)


def test_a_biased_policy_is_not_followed() -> None:
    pac = LINEAR.replace(linear=Rank(0.6, 0.0))
    found = allocate(build("llama"), BATCH, pac, pac, bits=(), rank_bits=(None,))
    assert all(d.keep.r2 > 0 for d in found.decisions)
    assert found.uniform_variance > 0


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 9)
    )
    model[1].eval()
    model[3].weight.grad = torch.ones(16, 24)
    model[5].weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    x_MN = torch.randn(60, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, classes = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    state, own = torch.get_rng_state(), [set(vars(m)) for m in model.modules()]
    config = LEAN.replace(min_width=4)
    for how in ({}, {"objective": lambda y: y.sum() * math.nan}):
        try:
            found = allocate(
                model, x_MN, config, config, include="*", **{"objective": lambda y: y.square().mean()} | how
            )
            assert [d.name for d in found.decisions] == ["0", "3", "4"]
        except ValueError as error:
            assert "NaN" in str(error)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [type(m) for m in model.modules()] == classes
        assert [m.training for m in model.modules()] == modes
        assert [set(vars(m)) for m in model.modules()] == own
        assert torch.equal(model[3].weight.grad, torch.ones(16, 24))
        assert all(p.grad is None for p in model.parameters() if p is not model[3].weight)


def test_the_same_again_and_the_users_random_numbers_do_not_matter() -> None:
    model = build("llama")
    first = allocate(model, BATCH, FAST, FAST, bits=())
    torch.manual_seed(99)
    assert allocate(model, BATCH, FAST, FAST, bits=()) == first


def test_it_goes_on_from_an_allocation() -> None:
    model = build("llama")
    first = allocate(model, BATCH, FAST, FAST, bits=())
    again = allocate(model, BATCH, first.config, first.config, bits=())
    assert again.budget == first.bytes_per_token
    assert again.uniform_variance == pytest.approx(first.variance, rel=1e-6)
    assert again.variance <= first.variance * (1 + 1e-6)


def test_in_bfloat16() -> None:
    found = allocate(build("llama"), BATCH, FAST, FAST, bits=(), autocast=torch.bfloat16)
    full = allocate(build("llama"), BATCH, FAST, FAST, bits=())
    assert found.variance == pytest.approx(full.variance, rel=0.1)
    model = build("llama").bfloat16()
    found = allocate(model, BATCH, LEAN, LEAN)
    handle = prac.compress(model, found.config)
    assert sum(row.after or 0 for row in handle.rows()) == found.bytes_per_token


# --- what can go wrong -------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="a budget of 7 bytes per token is too small") as error:
        allocate(model, BATCH, 7, LEAN)
    least = int(str(error.value).split("cheapest choice takes ")[1].split(",")[0])
    assert allocate(model, BATCH, least, LEAN).bytes_per_token == least
    with pytest.raises(ValueError, match="too small"):
        allocate(model, BATCH, least - 1, LEAN)


def test_errors() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="give bits, rank_bits or both"):
        allocate(model, BATCH, LEAN, bits=(), rank_bits=())
    with pytest.raises(ValueError, match="unknown preset 'leen'"):
        allocate(model, BATCH, "leen")
    with pytest.raises(ValueError, match="output has no loss"):
        allocate(model, {"input_ids": IDS}, LEAN, LEAN)
    with pytest.raises(ValueError, match="nothing to compress in this Sequential"):
        allocate(nn.Sequential(nn.ReLU()), torch.zeros(2, 3), "lean")
    with pytest.raises(ValueError, match="factors that are made anew"):
        allocate(model, BATCH, LEAN, LEAN.replace(layers={"model.norm": Factors()}))
    with pytest.raises(ValueError, match="orthonormal random directions"):
        allocate(model, BATCH, PAPER, PAPER.replace(linear=Rank(0.3, 0.3, orthonormal=False)))
    only_norms = PAPER.replace(linear=None, activation=None)
    with pytest.raises(ValueError, match="nothing is up for choice in this LlamaForCausalLM"):
        allocate(model, BATCH, only_norms, only_norms)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*calibration batch hold NaN or Inf"):
        allocate(model, BATCH, LEAN, LEAN)
    assert not any(isinstance(module, Compressed) for module in model.modules())
    prac.compress(model, LEAN)
    with pytest.raises(ValueError, match="compressed already"):
        allocate(model, BATCH, LEAN)
