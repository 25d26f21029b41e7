"""The mildest way that fits a budget."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import prac
from prac.layers import Compressed
from prac.memory import Step, choose, largest_batch, measure, predict
from prac.memory.budget import LADDER
from prac.memory.largest_batch import parse_budget


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, vocab_size=512
            )
        )


def batch(rows: int = 32) -> dict[str, Tensor]:
    ids = torch.empty(rows, 64, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


PEAKS = {rung.name: predict(model(), batch(), rung.config, loss=rung.loss).peak for rung in LADDER}


def test_every_rung_takes_less_than_the_one_before() -> None:
    peaks = list(PEAKS.values())
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_the_mildest_that_fits(rung: object) -> None:
    name = rung.name  # type: ignore[attr-defined]
    found = choose(Step(model(), batch()), PEAKS[name])
    assert found.name == name
    assert found.predicted.peak == PEAKS[name]
    assert list(found.rejected) == [r.name for r in LADDER][: [r.name for r in LADDER].index(name)]
    assert name in str(found)


def test_a_budget_that_cannot_be_met_says_by_how_much_and_what_would_fit() -> None:
    budget, net = PEAKS["small"] * 3 // 4, model()
    before = [vars(module).keys() for module in net.modules()]
    with pytest.raises(
        ValueError, match=r"is not enough: small, which takes least, would take .* more. What would fit: a batch of"
    ) as e:
        prac.compress(net, budget=budget, batch=batch())
    text = str(e.value)
    assert "checkpointing as well" in text and "LoRA" in text and "in 8 bits a quarter" in text
    assert 0 < float(text.split("_enable()): ")[1].split()[0]) * 2**20 < PEAKS["small"]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    assert [vars(module).keys() for module in net.modules()] == before
    assert type(net.model.layers[0].mlp).__name__ == "LlamaMLP"
    rows = int(text.split("a batch of ")[1].split()[0])
    peaks = [predict(model(), batch(r), "small", loss="chunked").peak for r in (rows, rows + 1)]
    assert peaks[0] <= budget < peaks[1]
    with pytest.raises(ValueError, match="not even a batch of 1"):
        choose(Step(model(), batch()), 1000)


@pytest.mark.parametrize(
    ("config", "sizes"), [(None, (45,)), pytest.param("lean", (3, 45, 100), marks=pytest.mark.long)]
)
def test_the_largest_batch(config: str | None, sizes: tuple[int, ...]) -> None:
    for rows in sizes:
        limit = predict(model(), batch(rows), config).peak
        assert largest_batch(model(), batch(), limit, config) == rows
        assert largest_batch(model(), batch(), limit - 1, config) == rows - 1


def test_budgets() -> None:
    assert parse_budget("24GiB") == 24 * 2**30
    assert parse_budget("80 GB") == 80 * 10**9
    assert parse_budget("1.5g") == 1_500_000_000
    assert parse_budget(5) == 5
    assert parse_budget(0.5 * 2**30) == 2**29 and parse_budget("1e9") == parse_budget(1e9) == 10**9
    for wrong in ("plenty", 0, -5, 0.5, float("nan"), float("inf"), True, "0GiB", "1e999", "9" * 400, None):
        with pytest.raises(ValueError, match="a budget"):
            parse_budget(wrong)  # type: ignore[arg-type]


def test_a_model_without_a_chunkable_loss_skips_that() -> None:
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.empty(4096, 64)
    how = {"objective": lambda y: y.square().mean()}
    plain = predict(net, x, **how).peak
    assert choose(Step(net, x, **how), plain).name == "plain"
    found = choose(Step(net, x, **how), plain - 1)
    assert found.config is not None
    assert not found.loss
    assert "chunked loss" not in found.rejected


def test_logits_are_left_in_where_leaving_them_out_saves_nothing() -> None:
    """A vocabulary so small that a step without them takes no less."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    rows = {name: torch.zeros(8, 64, dtype=torch.long) for name in ("input_ids", "labels")}
    net = LlamaForCausalLM(config)
    plain, chunked = (predict(net, rows, loss=loss).peak for loss in (None, "chunked"))
    assert chunked >= plain
    found = choose(Step(net, rows), plain)
    assert found.name == "plain" and found.further is not None and found.further[1] < plain
    found = choose(Step(net, rows), plain - 1)
    assert found.config is not None and not found.loss and list(found.rejected) == ["plain"]


def real_model() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(model().config)


def real_batch(rows: int = 32) -> dict[str, Tensor]:
    ids = torch.randint(0, 512, (rows, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_checked_against_a_real_step() -> None:
    """What is predicted to fit is tried; the model and its random numbers are as before."""
    net = real_model().eval()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = choose(Step(net, real_batch()), PEAKS["lean"] * 11 // 10, check=True)
    assert found.name == "lean"
    assert found.real == pytest.approx(found.predicted.peak, rel=0.05)
    assert "when tried" in str(found)
    assert not net.training
    assert type(net.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert net(**real_batch()).logits is not None
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_real_step_that_takes_more_goes_on_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def too_much(*args: object, **kwargs: object) -> object:
        tried.append("")
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        return measure(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["prac.memory.budget"], "measure", too_much)
    found = choose(Step(real_model(), real_batch()), PEAKS["plain"] * 11 // 10, check=True)
    assert found.name == "chunked loss"
    assert found.rejected == {"plain": PEAKS["plain"] * 11 // 10 + 1}
    assert len(tried) == 2


def test_compress_for_a_budget_takes_what_fits_and_says_what_it_is() -> None:
    net = real_model()
    handle = prac.compress(net, budget=PEAKS["lean"], batch=real_batch())
    assert handle.choice.name == "lean" and handle.config == prac.PRESETS["lean"]
    assert isinstance(net.model.layers[0].mlp, Compressed)
    text = handle.summary()
    assert "lean fits" in text and "To go further: lean+attention8 would take" in text
    assert handle.choice.further[1] == PEAKS["lean+attention8"]
    net.train()(**real_batch()).loss.backward()
    handle.restore()
    assert type(net.model.layers[0].mlp).__name__ == "LlamaMLP" and net(**real_batch()).logits.dim() == 3


def test_a_model_that_fits_is_left_as_it_is() -> None:
    for name, loses_logits in (("plain", False), ("chunked loss", True)):
        net = real_model()
        before = {name: type(module) for name, module in net.named_modules()}
        handle = prac.compress(net, budget=PEAKS[name], batch=real_batch())
        assert handle.choice.name == name and handle.choice.config is None
        assert {name: type(module) for name, module in net.named_modules()} == before
        assert f"{name} fits the budget: stays in full" in handle.summary()
        out = net.train()(**real_batch())
        assert out.loss.requires_grad and handle.step == 0
        assert (type(out.logits) is not Tensor) == loses_logits
        handle.restore()
        assert type(net(**real_batch()).logits) is Tensor


def test_a_budget_is_for_a_batch_and_in_place_of_a_config() -> None:
    net = real_model()
    for wrong, error, words in (
        ({"budget": "1GiB"}, ValueError, "batch=batch"),
        ({"budget": "1GiB", "batch": real_batch(), "config": "lean"}, ValueError, "takes the place of config"),
        ({"budget": "1GiB", "batch": real_batch(), "loss": "chunked"}, ValueError, "takes the place of loss"),
        ({"budget": "much", "batch": real_batch()}, ValueError, "got 'much'"),
        ({"batch": real_batch()}, TypeError, "takes batch for a budget alone"),
        ({"optimiser": None}, TypeError, "optimiser"),
        ({"budget": "1GiB", "batch": real_batch(), "optimiser": None}, TypeError, "optimiser"),
    ):
        with pytest.raises(error, match=words):
            prac.compress(net, **wrong)
        assert type(net.model.layers[0].mlp).__name__ == "LlamaMLP"
