"""The chunked loss against the plain one, as a function and inside models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build
from torch import Tensor, nn

import prac
from prac.convert.chunked_loss import ChunkedLoss
from prac.memory.allocator import allocated
from prac.ops import cross_entropy, linear_cross_entropy


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, of)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_against_cross_entropy_in_float64(
    monkeypatch: pytest.MonkeyPatch, biased: bool, smoothing: float, reduction: str
) -> None:
    torch.manual_seed(0)
    m, n, v = 53, 19, 301
    x, w, b = torch.randn(m, n), torch.randn(v, n) / n**0.5, torch.randn(v)
    target = torch.randint(0, v, (m,))
    target[::7] = -100

    def both(dtype: torch.dtype, chunked: bool) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in ((x, w, b) if biased else (x, w))]
        bias = leaves[2] if biased else None
        how: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        if chunked:
            loss = linear_cross_entropy(leaves[0], leaves[1], target, bias, **how)
        else:
            loss = F.cross_entropy(F.linear(leaves[0], leaves[1], bias), target, **how)
        return [loss.double(), *gradients(loss, *leaves)]

    monkeypatch.setattr(cross_entropy, "rows_per_chunk", lambda *shape: 17)  # three chunks and a rest
    for found, expected in zip(both(torch.float32, True), both(torch.float64, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_bfloat16_is_as_exact_as_the_plain_way() -> None:
    torch.manual_seed(0)
    x, w, target = torch.randn(2048, 64), torch.randn(512, 64) / 8, torch.randint(0, 512, (2048,))
    leaves = [t.bfloat16().requires_grad_() for t in (x, w)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.cross_entropy(exact[0] @ exact[1].mT, target)
    plain = F.cross_entropy((leaves[0] @ leaves[1].mT).float(), target)
    found = linear_cross_entropy(*leaves, target)
    assert found.dtype == torch.float32
    assert abs(found.item() - expected.item()) < 1e-4
    rows = zip(gradients(found, *leaves), gradients(plain, *leaves), gradients(expected, *exact), strict=True)
    for ours, its, true in rows:
        # The weight's is rounded once for each chunk and once more in the end, the plain one once.
        assert (ours - true).norm() < 1.5 * (its - true).norm()


def test_a_second_time_through_is_refused() -> None:
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    loss = linear_cross_entropy(x, w, torch.zeros(5, dtype=torch.long))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_logits_are_never_there() -> None:
    m, n, v = 4096, 32, 4000
    x, w = torch.randn(m, n, requires_grad=True), torch.randn(v, n, requires_grad=True)
    target = torch.randint(0, v, (m,))
    with allocated(x.device) as chunked:
        linear_cross_entropy(x, w, target).backward()
    with allocated(x.device) as plain:
        F.cross_entropy(x @ w.mT, target).backward()
    assert plain.peak > 2 * m * v * 4
    assert chunked.peak < plain.peak / 2


def step(model: nn.Module, **batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model.train()(**batch)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()} | grads


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 9:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_models_train_the_same(family: str) -> None:
    plain = build(family)
    chunked = copy.deepcopy(plain)
    loss = ChunkedLoss(chunked)
    expected, found = step(plain, **batch()), step(chunked, **batch())
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert chunked(**batch()).logits is None
    count = torch.tensor(20)
    torch.testing.assert_close(
        chunked(**batch(), num_items_in_batch=count).loss, plain(**batch(), num_items_in_batch=count).loss
    )
    loss.remove()
    torch.testing.assert_close(chunked(**batch()).logits, plain(**batch()).logits)


def test_tied_weights() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=97,
        tie_word_embeddings=True,
    )  # fmt: skip
    plain = LlamaForCausalLM(config)
    chunked = copy.deepcopy(plain)
    ChunkedLoss(chunked)
    expected, found = step(plain, **batch()), step(chunked, **batch())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_eval_and_no_labels_are_left_alone() -> None:
    model = build("llama")
    ChunkedLoss(model)
    ids = batch()["input_ids"]
    assert model.train()(input_ids=ids).logits.shape == (3, 17, 97)
    assert model.eval()(**batch()).logits.shape == (3, 17, 97)
    with torch.no_grad():
        assert model.train()(**batch()).logits.shape == (3, 17, 97)


def test_in_evaluations_too() -> None:
    model = build("llama").eval()
    with torch.no_grad():
        expected = model(**batch()).loss
        ChunkedLoss(model, always=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("kept"), lambda t: t):
            found = model(**batch())
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None


def test_a_copy_has_its_own() -> None:
    model = build("llama")
    ChunkedLoss(model)
    twin = copy.deepcopy(model)
    before = step(model, **batch())
    for p in twin.parameters():
        p.data.zero_()
    after = step(model, **batch())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert step(twin, **batch())["loss"].item() == pytest.approx(torch.tensor(97.0).log().item())


def test_bf16_autocast() -> None:
    plain = build("llama")
    chunked = copy.deepcopy(plain)
    ChunkedLoss(chunked)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain.train()(**batch()).loss, chunked.train()(**batch()).loss
    # The plain way rounds the logits to bfloat16 before it takes their loss in float32.
    torch.testing.assert_close(a, b, rtol=5e-3, atol=0)


def test_soft_capping_is_refused() -> None:
    model = build("gemma2")
    before = step(model, **batch())
    with pytest.raises(ValueError, match="soft-capping"):
        ChunkedLoss(model)
    after = step(model, **batch())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="a loss of its own"):
        ChunkedLoss(build("t5"))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_is_no_causal_language_model_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="causal language model"):
        ChunkedLoss(build(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beside_compression(family: str) -> None:
    config = prac.PRESETS["lean"].replace(min_width=8)
    plain, chunked = build(family), build(family)
    handle = prac.compress(chunked, config, loss="chunked")
    prac.compress(plain, config)
    expected, found = step(plain, **batch()), step(chunked, **batch())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    handle.restore()
    assert chunked.train()(**batch()).logits is not None


def test_a_model_whose_loss_cannot_be_chunked_is_left_uncompressed() -> None:
    model = build("gemma2")
    with pytest.raises(ValueError, match="soft-capping"):
        prac.compress(model, prac.PRESETS["lean"].replace(min_width=8), loss="chunked")
    assert prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    with pytest.raises(ValueError, match="must be"):
        prac.compress(build("llama"), loss="liger")  # type: ignore[arg-type]


def test_a_config_that_does_not_fit_leaves_the_loss_as_it_was() -> None:
    model = build("llama").train()
    with pytest.raises(ValueError, match="r1"):
        prac.compress(model, prac.Config(linear=prac.Rank(33, 0)), loss="chunked")
    assert model(input_ids=IDS, labels=IDS).logits is not None
    assert "forward" not in vars(model.get_output_embeddings())


def test_with_lora() -> None:
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=4))
    chunked = copy.deepcopy(plain)
    prac.ChunkedLoss(chunked)
    expected, found = step(plain, **batch()), step(chunked, **batch())
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
