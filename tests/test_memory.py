"""The predicted memory of a training step against the measured one."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from models import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import prac
from prac.lab.measured.footprint import OPTIMIZERS
from prac.lab.methods.peers import checkpoint_blocks
from prac.memory import Breakdown, measure, predict, track_kept
from prac.runtime import fake

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "t5", "vit", "bert")
METHODS = ("plain", "checkpoint", "paper", "lean", "small")
LESS_OFTEN = ("selective", "pac", "rac", "fast", "finetune")  # that keep as others do, so with two families alone
WAYS = [(family, method) for method in METHODS for family in FAMILIES] + [
    pytest.param(family, method, marks=() if family in ("llama", "t5") else pytest.mark.long)
    for method in LESS_OFTEN for family in FAMILIES
]  # fmt: skip


def batch_for(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {
            "pixel_values": torch.randn(48, 3, 24, 24, generator=generator),
            "labels": torch.zeros(48, dtype=torch.long),
        }
    ids = torch.randint(3, 97, (96, 17), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if family == "bert" else ids}


def prepared(family: str, method: str) -> tuple[nn.Module, prac.Config | None]:
    model = build(family).train()
    if method in ("checkpoint", "selective"):
        checkpoint_blocks(model, selective=method == "selective")
    return model, prac.PRESETS[method].replace(min_width=8) if method in prac.PRESETS else None


def agree(model: nn.Module, batch: dict[str, Tensor], config: prac.Config | None, **how: Any) -> tuple[Breakdown, ...]:
    predicted = predict(model, batch, config, optimizer=None, **how)
    if config is not None:
        prac.compress(model, config)
    measured = measure(model, batch, **how)
    assert predicted.peak == pytest.approx(measured.peak, rel=0.03)
    assert predicted.activations == pytest.approx(measured.activations, rel=0.03)
    return predicted, measured


@pytest.mark.parametrize(("family", "method"), WAYS)
def test_prediction_and_measurement_agree(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_KERNELS", "eager")
    model, config = prepared(family, method)
    predicted, measured = agree(model, batch_for(family), config)
    # Also by kind; what several kinds keep counts for the first, and that may be another one.
    for kind in set(predicted.kept) & set(measured.kept) - {"checkpoint"}:
        assert predicted.kept[kind] == pytest.approx(measured.kept[kind], abs=0.05 * measured.activations), kind


@pytest.mark.parametrize("method", ["plain", "lean"])
def test_under_autocast(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_KERNELS", "eager")
    model, config = prepared("llama", method)
    agree(model, batch_for("llama"), config, autocast=torch.bfloat16)


@pytest.mark.parametrize("method", ["plain", "checkpoint", "paper", "lean"])
def test_without_logits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_KERNELS", "eager")
    model, config = prepared("llama", method)
    predicted = predict(model, batch_for("llama"), config, optimizer=None, loss="chunked")
    if config is None:
        prac.ChunkedLoss(model)
    else:
        prac.compress(model, config, loss="chunked")
    measured = measure(model, batch_for("llama"))
    assert predicted.peak == pytest.approx(measured.peak, rel=0.03)
    assert predicted.activations == pytest.approx(measured.activations, rel=0.03)
    assert predicted.kept["logits"] < 0.3 * predict(build("llama"), batch_for("llama"), config).kept["logits"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_of_real_optimizers(optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    model = build("llama").train()
    predicted = predict(model, batch_for("llama"), optimizer=make)
    made = make(model)
    for each in made if isinstance(made, list) else [made]:
        model(**batch_for("llama")).loss.backward()
        each.step()
        measured = measure(model, batch_for("llama"), optimizer=each)
        predicted.at_peak["optimizer"] -= measured.at_peak["optimizer"]
    assert abs(predicted.at_peak["optimizer"]) < 0.01 * measured.at_peak["parameters"]  # steps are numbers of their own


def test_some_layers_alone() -> None:
    """As compress takes them."""
    how = {"exclude": "*.mlp*", "include": "*layers*"}
    model, config = prepared("llama", "paper")
    assert config is not None
    predicted = predict(model, batch_for("llama"), config, optimizer=None, **how)
    assert predicted.activations > predict(model, batch_for("llama"), config).activations
    prac.compress(model, config, **how)
    assert predicted.activations == pytest.approx(measure(model, batch_for("llama")).activations, rel=0.03)


def test_inputs_of_checkpointed_blocks_have_a_kind_of_their_own() -> None:
    model, _ = prepared("llama", "checkpoint")
    found, measured = predict(model, batch_for("llama")), measure(model, batch_for("llama"))
    blocks = 2 * batch_for("llama")["input_ids"].numel() * 32 * 4
    assert found.kept["checkpoint"] == pytest.approx(blocks, rel=0.02)
    assert measured.kept["checkpoint"] == pytest.approx(blocks, rel=0.05)
    assert "other" not in found.kept


@pytest.mark.parametrize("method", ["lean", pytest.param("fast", marks=pytest.mark.long), "small"])
def test_kernels_count_as_one(method: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
    )  # fmt: skip
    ids = torch.randint(3, 97, (16, 128), generator=torch.Generator().manual_seed(0))
    agree(LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}, prac.PRESETS[method])


@pytest.mark.parametrize("method", ["plain", "checkpoint"])
def test_as_torch_itself_has_it(method: str) -> None:
    model, _ = prepared("llama", method)
    batch = batch_for("llama")
    found = predict(model, batch)
    with fake.faked(model, batch) as (twin, fakes):
        optimizer = torch.optim.AdamW(twin.parameters(), fused=True)
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(twin, optimizer, *fakes.values())
        with tracker:
            loss = twin(**fakes).loss
            loss.backward()
            optimizer.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    assert found.peak == pytest.approx(snapshot["Total"], rel=0.02)
    assert found.at_peak["optimizer"] == pytest.approx(snapshot["Optstate"], rel=0.02)


def test_sizes_of_the_parts() -> None:
    model, _ = prepared("llama", "plain")
    parameters = sum(p.numel() * 4 for p in model.parameters())
    found = predict(model, batch_for("llama"), prac.PRESETS["paper"].replace(min_width=8))
    assert found.at_peak["parameters"] == pytest.approx(parameters, rel=0.001)
    assert found.at_peak["optimizer"] == pytest.approx(2 * parameters, rel=0.001)
    assert sum(found.at_peak.values()) == found.peak
    assert "backward" in found.where
    assert "peak" in str(found)
    assert found.to_dict()["peak_bytes"] == found.peak


def test_a_model_too_large_for_this_machine() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=3,
                                             num_attention_heads=32, vocab_size=128256))  # fmt: skip
        ids = torch.empty(8, 4096, dtype=torch.long)
    plain = predict(model, {"input_ids": ids, "labels": ids})
    lean = predict(model, {"input_ids": ids, "labels": ids}, "lean")
    assert plain.peak > 64 * 2**30
    assert lean.activations < 0.8 * plain.activations
    assert all(p.is_meta for p in model.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model, config = prepared("llama", "lean")
    before = copy.deepcopy(model.state_dict())
    predict(model, batch_for("llama"), config)
    measure(model, batch_for("llama"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_a_module_of_your_own() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(256, 32)
    agree(model, x, None, objective=lambda y: y.square().mean())


def test_what_cannot_be_predicted() -> None:
    model, config = prepared("llama", "lean")
    with pytest.raises(ValueError, match="has no loss"):
        predict(model, {"input_ids": batch_for("llama")["input_ids"]})
    with pytest.raises(ValueError, match="has no loss"):
        measure(model, {"input_ids": batch_for("llama")["input_ids"]})
    prac.compress(model, config)
    with pytest.raises(ValueError, match="before compress"):
        predict(model, batch_for("llama"))


def test_tracking_of_kept_bytes_still_works_on_fakes() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        with track_kept(model) as kept:
            model(torch.empty(5, 8))
    assert kept.total == 5 * 8 * 4 + 5 * 16 * 4


def test_tracking_keeps_nothing_alive() -> None:
    model = build("llama").train()
    output = []
    model.get_submodule("model.layers.0").register_forward_hook(lambda module, args, y: output.append(weakref.ref(y)))
    with track_kept(model):
        model(**batch_for("llama"))  # and no backward, which would set free what it has used
    assert output[0]() is None
