"""A budget that cannot be met, a step that is none: what is said, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from test_budget import PEAKS, batch, real_batch, real_model
from torch import nn

import prac
from prac.layers import Compressed
from prac.memory import Step, choose, predict
from prac.memory.budget import LADDER


def little_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512))


def hooks_on(net: nn.Module) -> list[list[object]]:
    return [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in net.modules()]


def test_what_is_advised_can_be_followed_and_nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Checkpointing first, then the budget that did not fit."""
    net = little_model()
    before, config = hooks_on(net), net.config.to_dict()
    recomputed = predict(net, real_batch(), "small", loss="chunked", checkpoint=True).peak
    with pytest.raises(ValueError, match="checkpointing as well") as error:
        prac.compress(net, budget=recomputed, batch=real_batch())
    assert hooks_on(net) == before and net.config.to_dict() == config
    assert "use_cache" not in caplog.text
    said = str(error.value).split("_enable()): ")[1].split()[0]
    assert float(said) * 2**20 == pytest.approx(recomputed, rel=0.01)
    net.gradient_checkpointing_enable()
    assert prac.compress(net, budget=recomputed, batch=real_batch()).choice.predicted.peak <= recomputed
    with pytest.raises(ValueError, match="has no switch for gradient checkpointing"):
        predict(nn.Sequential(nn.Linear(8, 8)), torch.zeros(2, 8), checkpoint=True)


def test_the_way_that_takes_least_is_the_one_that_an_error_speaks_of() -> None:
    """Small and wide at its ends: compressing keeps more than it saves."""
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    x = torch.empty(4096, 64)
    step = Step(net, x, objective=lambda y: y.square().mean())
    peaks = {rung.name: step.predicted(rung._replace(loss=None)).peak for rung in LADDER if rung.name != "chunked loss"}
    assert min(peaks, key=lambda name: peaks[name]) == "plain"
    with pytest.raises(ValueError, match="is not enough: plain, which takes least, would") as error:
        choose(step, peaks["plain"] // 2)
    rows = int(str(error.value).split("a batch of ")[1].split()[0])
    assert step._replace(batch=x[:rows]).predicted(LADDER[0]).peak <= peaks["plain"] // 2
    assert "checkpointing" not in str(error.value)


def test_what_is_no_step_is_refused_before_anything_is_done() -> None:
    net, ids = little_model(), real_batch(2)
    frozen = little_model().requires_grad_(False)
    for model_, batch_, how, error, words in (
        (net, ids, {"optimizer": torch.optim.SGD}, TypeError, "a function that makes one for a model.*got SGD"),
        (net, ids, {"optimizer": torch.optim.AdamW(net.parameters())}, TypeError, "got AdamW"),
        (net, ids, {"optimizer": "adamw"}, TypeError, "got str"),
        (net, ids, {"optimizer": lambda model: model}, TypeError, "it made a LlamaForCausalLM"),
        (net, ids, {"autocast": "bf16"}, TypeError, "torch.bfloat16, got 'bf16'"),
        (net, ids, {"objective": lambda output: output}, ValueError, "has to give a tensor with one number"),
        (net, ids, {"objective": lambda output: output.loss * torch.ones(3)}, ValueError, "a tensor of shape"),
        (net, {"input_ids": [[1, 2]]}, {}, TypeError, "holds no tensor"),
        (net, 3, {}, TypeError, "a batch is a tensor"),
        (frozen, ids, {}, ValueError, "no parameter of the model requires a gradient"),
        (nn.Identity(), ids, {}, ValueError, "no parameter of the model requires a gradient"),
    ):
        with pytest.raises(error, match=words):
            prac.compress(model_, budget="1GiB", batch=batch_, **how)  # type: ignore[arg-type]
        assert not any(isinstance(m, Compressed) for m in model_.modules())


def test_a_batch_that_cannot_be_trained_on_is_refused_where_it_would_be_run() -> None:
    """On CUDA a token that is not there would end the process's use of it."""
    for batch_, words in (
        (
            {name: torch.full((2, 8), 512) for name in ("input_ids", "labels")},
            "go from 512 to 512, and the model has 512",
        ),
        ({name: torch.full((2, 8), -7) for name in ("input_ids", "labels")}, "go from -7"),
        (batch(2), "could not be tried on a real step"),
    ):
        net = little_model()
        assert choose(Step(net, batch_), "1GiB").real is None  # predicted by its shape
        with pytest.raises(ValueError, match=words):
            prac.compress(net, budget="1GiB", batch=batch_, check=True)
        assert not any(isinstance(m, Compressed) for m in net.modules())


def test_trying_leaves_statistics_of_batches_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.LayerNorm(64))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    choose(Step(net, x, objective=lambda y: y.square().mean()), "1GiB", check=True)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_summary_says_that_the_loss_is_chunked() -> None:
    for name in ("chunked loss", "lean"):
        net = real_model()
        handle = prac.compress(net, budget=PEAKS[name], batch=real_batch())
        assert "The loss goes through the tokens in chunks" in handle.summary()
        assert ("chunked loss fits the budget: stays in full" in handle.summary()) == (name == "chunked loss")
        with pytest.raises(ValueError, match="already"):
            prac.compress(net, budget=PEAKS[name], batch=real_batch())
        handle.restore()
        assert "chunks" not in handle.summary()


def test_a_batch_that_was_refused_is_not_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted to fit, and then it takes a tenth more."""
    from prac.memory import budget

    step = Step(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.empty(512, 64))
    step = step._replace(objective=lambda y: y.square().mean())
    plain = step.predicted(LADDER[0])
    monkeypatch.setattr(
        budget, "_real_peak", lambda step, rung: int(1.1 * step.predicted(rung).peak) - plain.at_peak["optimizer"]
    )
    peaks = [step.predicted(rung._replace(loss=None)).peak for rung in LADDER if rung.name != "chunked loss"]
    with pytest.raises(ValueError, match="What would fit: a batch of") as error:
        choose(step, max(peaks) // 2, check=True)
    rows = int(str(error.value).split("a batch of ")[1].split()[0])
    assert 0 < rows < 512
    with pytest.raises(ValueError, match="a batch of") as error:
        choose(step, int(1.05 * min(peaks)), check=True)
    assert 300 < int(str(error.value).split("a batch of ")[1].split()[0]) < 512


def test_an_objective_of_the_logits_leaves_them_in() -> None:
    """Where it could be chunked otherwise, and the objective works in plain training alone."""
    net, ids = little_model(), real_batch(2)
    step = Step(net, ids, objective=lambda output: output.logits.float().square().mean())
    lean = step.predicted(LADDER[2]._replace(loss=None)).peak
    with pytest.warns(UserWarning, match="the loss is not chunked, since the objective fails without logits"):
        found = choose(step, lean)
    assert found.loss is None and found.predicted.peak <= lean
    with pytest.raises(ValueError, match="no parameter has a part in"):
        choose(step._replace(objective=lambda output: torch.tensor(1.0)), lean)
